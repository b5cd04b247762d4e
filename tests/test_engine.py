"""The loop against plain torch loops written by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import PLAIN, metrics, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.evaluate import predict
from kdkit.engine.loop import train_epoch
from kdkit.randomness import reseed
from kdkit.runs import opening, training
from kdkit.runs.networks import ModelFactory

NO_NORM = {"model": "mlp/16-8"}


def trainer_of(folder, base=PLAIN, **changes):
    """The first stage's trainer, and the teacher."""
    loaded = recipe.load(write(folder, base, **changes))
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    stage = next(iter(loaded.plugins.schedules[loaded.spec.schedule.use](loaded.spec.schedule).stages(factory)))
    return training.build_trainer(loaded, prepared, factory, accelerator, 0, stage), factory


def epoch(trainer):
    return list(train_epoch(trainer))


def test_three_training_steps_equal_a_plain_loop(tmp_path):
    sgd = {"lr": 0.1, "name": "momentum", "momentum": 0.9, "weight_decay": 0.01, "decay_norm_and_bias": True}
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl", "weight": 0.9, "temperature": 3.0}]
    trainer, factory = trainer_of(
        tmp_path, losses=losses, data={"batch_size": 16}, train={"epochs": 1, "optimizer": sgd, "lr_schedule": {"name": "constant"}}
    )
    tapped, teacher = trainer.stage.students[0], factory.teacher()
    student = copy.deepcopy(tapped.module)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = list(trainer.loader.epoch(0))
    assert len(batches) == 3
    losses = [float(values[0].total.detach()) for values in epoch(trainer)]

    student.train()
    for batch, loss in zip(batches, losses, strict=True):
        images = tapped.adapt(batch.inputs)
        with torch.no_grad():
            z_t = teacher.module(teacher.adapt(batch.inputs))
        z_s = student(images)
        soft = F.kl_div(F.log_softmax(z_s / 3, 1), F.softmax(z_t / 3, 1), reduction="batchmean") * 9
        total = F.cross_entropy(z_s, batch.labels) + 0.9 * soft
        assert loss == pytest.approx(float(total.detach()), rel=1e-5)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(tapped.module.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def perceptron():
    """PLAIN with networks that have no batch normalisation."""
    return {**PLAIN, "student": NO_NORM, "teacher": {"model": "mlp/16"}}


@pytest.mark.parametrize("clip", [None, 0.05])
def test_small_batches_accumulated_equal_a_large_one(tmp_path, perceptron, clip):
    """44 images: one step of 32 and one of 12, or 8 x 4 and (8 + 4), the last group and the last batch being smaller."""
    found = []
    for number, (size, accumulate) in enumerate([(32, 1), (8, 4)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        changes = {
            "data": {"batch_size": size, "drop_last": False, "dataset": {"train": 44}},
            "train": {"accumulate": accumulate, "clip_grad": clip},
        }
        train(folder, perceptron, **changes)
        found.append((weights(folder / "run"), metrics(folder / "run")))
    (large, told), (small, retold) = found
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(told) == len(retold)
    for one, other in zip(told, retold, strict=True):
        for key in ("terms", "train"):
            assert other.get(key, {}) == pytest.approx(one.get(key, {}), rel=1e-4)
        assert other["lr"] == one["lr"]


def test_gradients_are_clipped_all_together(tmp_path):
    losses = [*PLAIN["losses"], {"use": "hint", "layers": [{"student": "stage2", "teacher": "stage2"}]}]
    trainer, _ = trainer_of(tmp_path, losses=losses, train={"clip_grad": 0.01})
    norms = []
    step = trainer.updaters[0].optimizer.step

    def measured(*args, **kwargs):
        norms.append(float(torch.stack([p.grad.norm() for p in trainer.learner.parameters() if p.requires_grad]).norm()))
        return step(*args, **kwargs)

    trainer.updaters[0].optimizer.step = measured
    epoch(trainer)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_moving_average_equals_one_made_by_hand(tmp_path):
    trainer, _ = trainer_of(tmp_path, train={"ema": {"decay": 0.7}})
    average = None
    for _ in train_epoch(trainer):
        now = {name: value.clone() for name, value in trainer.stage.students[0].module.state_dict().items()}
        before = average or now  # it begins at the first step's weights
        average = {n: 0.7 * before[n] + 0.3 * v if v.is_floating_point() else v for n, v in now.items()}
    deployed = trainer.deployed()[0].state_dict()
    for name, value in average.items():
        torch.testing.assert_close(deployed[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(deployed["conv1.weight"], now["conv1.weight"])


def test_mixup_ends_at_its_epoch(tmp_path):
    trainer, _ = trainer_of(tmp_path, train={"mixup": {"mixup_alpha": 0.5, "off_epoch": 1}})
    seen = []
    step = trainer.learner._lessons
    trainer.learner._lessons = lambda batch, moment: (seen.append(batch), step(batch, moment))[1]
    epoch(trainer)
    assert all(batch.labels.shape == (8, 6) and torch.allclose(batch.labels.sum(1), torch.ones(8)) for batch in seen)
    plain = list(trainer.loader._loader.epoch(0))
    assert not torch.equal(plain[0].inputs, seen[0].inputs)
    reseed(trainer.seed, "mixup", 0, 0, 0)
    np.random.rand()  # whether to mix at all: timm's first draw
    share = np.random.beta(0.5, 0.5)
    torch.testing.assert_close(seen[0].inputs, plain[0].inputs * share + plain[0].inputs.flip(0) * (1 - share))
    seen.clear()
    epoch(trainer)
    assert all(batch.labels.ndim == 1 for batch in seen)


def test_odd_batches_cannot_be_mixed(tmp_path):
    mix = {"mixup": {"mixup_alpha": 0.5}}
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: .*mixes pairs"):
        kdkit.check(write(tmp_path, train=mix, data={"batch_size": 7}))
    with pytest.raises(kdkit.RecipeError, match="even"):
        kdkit.check(write(tmp_path, train=mix, data={"drop_last": False, "train_samples": 47}))
    kdkit.check(write(tmp_path, train=mix, data={"train_samples": 47}))


def test_ramps_have_their_value_at_each_step(tmp_path):
    losses = [
        {"use": "cross_entropy", "weight": {"from": 1, "to": 3, "epochs": 1.5}},
        {"use": "logit_kl", "weight": 2, "temperature": {"from": 1, "to": 5, "epochs": 2}},
    ]
    trainer, _ = trainer_of(tmp_path, losses=losses)
    steps = trainer.steps_per_epoch
    assert steps == 6
    values = [values[0] for _ in range(2) for values in epoch(trainer)]
    for step, value in enumerate(values):
        weight = min(3, 1 + 2 * (step / steps) / 1.5)
        assert float(value.weighted["cross_entropy"]) == pytest.approx(weight * float(value.terms["cross_entropy"]), rel=1e-5)
        assert float(value.weighted["logit_kl"]) == pytest.approx(2 * float(value.terms["logit_kl"]), rel=1e-5)
        assert float(value.total.detach()) == pytest.approx(sum(map(float, value.weighted.values())), rel=1e-5)
    seen = []
    kl = trainer.learner.objectives[0].losses["logit_kl"]
    forward = kl.forward
    kl.forward = lambda *args: (seen.append(kl.options.temperature), forward(*args))[1]
    trainer.epoch = 0
    for _ in range(2):
        epoch(trainer)
    assert seen == pytest.approx([1 + 4 * (step / steps) / 2 for step in range(12)])


def test_every_learnable_part_of_every_loss_moves_in_one_step(tmp_path):
    layers = [{"student": "stage[123]", "teacher": "stage[123]"}]
    losses = [*PLAIN["losses"], {"use": "hint", "layers": layers}, {"use": "hint", "adapter": "linear", "layers": layers}]
    trainer, _ = trainer_of(tmp_path, losses=losses)
    before = {name: value.detach().clone() for name, value in trainer.learner.named_parameters()}
    next(train_epoch(trainer))
    assert sum(name.startswith("objectives") for name in before) == 3 * 3 + 3 * 2
    still = [name for name, value in trainer.learner.named_parameters() if torch.equal(before[name], value)]
    assert still == []


def test_a_probe_moves_no_statistics_and_students_train_in_every_epoch(tmp_path):
    trainer, _ = trainer_of(tmp_path, train={"evaluate_every": 1})
    fresh = {name: value.clone() for name, value in trainer.stage.students[0].module.named_buffers()}
    assert all(value.eq(1 if "var" in name else 0).all() for name, value in fresh.items())
    modes = []
    student = trainer.stage.students[0].module
    student.register_forward_pre_hook(lambda module, args: modes.append((torch.is_grad_enabled(), module.training)))
    for _ in range(2):
        epoch(trainer)
        predict(trainer.stage.students[0], list(trainer.loader.epoch(0)))
    assert set(modes) == {(True, True), (False, False)}
    assert modes.count((True, True)) == 12


def test_a_loss_may_not_hold_a_network_as_its_part(tmp_path):
    plugin = '''
import kdkit


class Greedy(kdkit.Loss):
    """Keeps the teacher."""

    name = "greedy"
    knowledge = "response"

    def setup(self, student, teacher, context=None):
        self.kept = context.teacher

    def forward(self, student, teacher, batch):
        return student.logits.mean()


@kdkit.hookimpl
def kdkit_losses():
    return [Greedy]
'''
    (tmp_path / "greedy.py").write_text(plugin)
    with pytest.raises(kdkit.KdkitError, match="greedy: holds a network of its context"):
        train(tmp_path, plugins=["greedy.py"], losses=[{"use": "cross_entropy"}, {"use": "greedy"}])


def test_trainer_resumes_from_its_state_dict_to_the_same_bits(tmp_path):
    changes = {
        "losses": [*PLAIN["losses"], {"use": "hint", "layers": [{"student": "stage2", "teacher": "stage2"}]}],
        "train": {"ema": {"decay": 0.5}},
    }
    whole, _ = trainer_of(tmp_path, **changes)
    half, _ = trainer_of(tmp_path, **changes)
    steps = train_epoch(half)
    for _ in range(4):
        next(steps)
    saved = copy.deepcopy(half.state_dict())
    again, _ = trainer_of(tmp_path, **changes)
    again.load_state_dict(saved)
    assert (again.epoch, again.step, again.steps) == (0, 4, 4)
    assert len(epoch(again)) == 2
    epoch(whole)
    for one, other in ((again.learner, whole.learner), (again.deployed()[0], whole.deployed()[0])):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_bf16_trains_on_the_cpu_with_losses_in_fp32(tmp_path):
    trainer, factory = trainer_of(tmp_path, train={"precision": "bf16"})
    assert factory.teacher().precision is None
    kinds = set()
    loss = trainer.learner.objectives[0].losses["logit_kl"]
    loss.register_forward_pre_hook(
        lambda module, args: kinds.add((args[0].logits.dtype, args[1].logits.dtype, torch.is_autocast_enabled("cpu")))
    )
    inner = set()
    trainer.stage.students[0].module.register_forward_hook(lambda module, args, output: inner.add(output.dtype))
    values = epoch(trainer)
    assert inner == {torch.bfloat16}
    assert kinds == {(torch.float32, torch.float32, False)}
    assert all(torch.isfinite(value.total) for step in values for value in step)


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(kdkit.RunError, match="^train.precision fp16 needs a GPU") as told:
        train(tmp_path, train={"precision": "fp16", "device": "cpu"})
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_networks_learn_alike(tmp_path):
    losses = [*PLAIN["losses"], {"use": "hint", "layers": [{"student": "stage2", "teacher": "stage2"}]}]
    for name, compiled in (("plain", False), ("compiled", True)):
        train(tmp_path, into=name, losses=losses, train={"compile": compiled, "epochs": 1})
    ours, theirs = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=key)
