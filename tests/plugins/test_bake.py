import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_engine import trainer_of
from test_stage_resume import interrupt_at
from training import PLAIN, Command, assert_same_run, together, train, write

import kdkit
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import batches
from kdkit.recipe import registry
from kdkit.testing import random_batch, random_outputs

Bake = registry.load().schedules["bake"]
PAIR = [{"student": "stage2", "teacher": "stage3"}]
RECIPE = {**PLAIN, "teacher": None, "schedule": {"use": "bake"}}
FEATURES = [*RECIPE["losses"], {"use": "hint", "adapter": "linear", "layers": PAIR}]


class Students:
    """Gives a fixed answer."""

    def __init__(self, answer):
        self.answer = answer

    def student(self, taps):
        self.taps = taps
        return lambda inputs: self.answer


def shares_of(f, omega, tau):
    """Propagated again and again, from image to image."""
    n = len(f)
    alike = [[float(torch.cosine_similarity(f[i], f[j], 0)) / tau for j in range(n)] for i in range(n)]
    a = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        others = torch.tensor([alike[i][j] for j in range(n) if j != i], dtype=torch.float64).softmax(0)
        a[i, [j for j in range(n) if j != i]] = others
    shares = torch.eye(n, dtype=torch.float64)
    for _ in range(2000):
        shares = omega * a @ shares + (1 - omega) * torch.eye(n, dtype=torch.float64)
    return shares


@pytest.mark.parametrize("options", [{}, {"omega": 0.9, "tau": 0.1}, {"omega": 0.0}, {"temperature": 1.0}])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 4)])
def test_targets_are_propagated_to_the_limit(shape, options):
    options = Bake.Options(layer="a", **options)
    answer = random_outputs({"a": shape}).map(torch.Tensor.double)
    models = Students(answer.map(lambda x: x.requires_grad_()))
    (stage,) = Bake(options).stages(models)
    (lesson,) = stage.step(random_batch())
    (teacher,) = lesson.teachers
    assert models.taps == ["a"] and lesson.student is models.answer
    assert not teacher.logits.requires_grad and not teacher.features["a"].requires_grad
    f, t = answer.features["a"].detach(), options.temperature
    shares = shares_of(f if f.ndim == 2 else f.mean((2, 3)), options.omega, options.tau)
    torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close((teacher.logits / t).softmax(1), shares @ (answer.logits.detach() / t).softmax(1))
    torch.testing.assert_close(teacher.features["a"], torch.einsum("ij,j...->i...", shares, f))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_targets_are_finite(size, scale):
    answer = random_outputs({"a": (7,)}, size=size).map(lambda x: x * scale)
    (stage,) = Bake(Bake.Options(layer="a")).stages(Students(answer))
    (lesson,) = stage.step(random_batch(size))
    (teacher,) = lesson.teachers
    assert teacher.logits.isfinite().all() and teacher.features["a"].isfinite().all()
    if size == 1 and not scale:
        torch.testing.assert_close((teacher.logits / 4).softmax(1), torch.full((1, 5), 0.2))


def test_a_layer_that_is_the_logits_stays_one_with_them():
    z = torch.randn(4, 5)
    (stage,) = Bake(Bake.Options(layer="a")).stages(Students(kdkit.Outputs(z, {"a": torch.randn(4, 3), "logits": z})))
    (teacher,) = stage.step(random_batch(4))[0].teachers
    assert teacher.features["logits"] is teacher.logits


def test_steps_equal_a_plain_loop(tmp_path):
    plainly = {"epochs": 1, "optimizer": {"lr": 0.02, "name": "momentum", "momentum": 0.9}, "lr_schedule": {"name": "constant"}}
    trainer, _ = trainer_of(tmp_path, RECIPE, train=plainly)
    (tapped,) = trainer.stage.students
    naive = kdkit.taps(copy.deepcopy(tapped.module).train(), ["penultimate"])
    optimizer = torch.optim.SGD(naive.module.parameters(), lr=0.02, momentum=0.9)
    seen = list(batches(trainer.loader, trainer.stage, 0))
    found = [float(values[0].total.detach()) for values in train_epoch(trainer)]
    for batch, total in zip(seen, found, strict=True):
        assert torch.equal(batch.labels[0::2], batch.labels[1::2])
        answer = naive(tapped.adapt(batch.inputs))
        z = answer.logits
        shares = shares_of(answer.features["penultimate"].detach(), 0.5, 1.0)
        q, p = (shares @ (z.detach().double() / 4).softmax(1)).float(), (z / 4).softmax(1)
        value = F.cross_entropy(z, batch.labels) + 16 * (q * (q / p).log()).sum() / len(z)
        assert total == pytest.approx(float(value.detach()), rel=1e-4)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    for name, value in naive.module.state_dict().items():
        torch.testing.assert_close(tapped.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("similar", "size"), [(1, 2), (3, 4)])
def test_images_of_a_class_come_together(tmp_path, similar, size):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule={"similar": similar})
    for batch in batches(trainer.loader, trainer.stage, 0):
        assert (batch.labels.view(-1, size) == batch.labels[::size, None]).all()


def test_without_similar_ones_chance_decides(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule={"similar": 0})
    assert trainer.stage.data.arrange is None


def test_a_stop_changes_nothing(tmp_path):
    train(tmp_path, RECIPE, into="whole", losses=FEATURES)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, RECIPE, losses=FEATURES)
    train(tmp_path, RECIPE, losses=FEATURES)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Each with the images of both."""
    (tmp_path / "net.py").write_text(NET)
    path = write(tmp_path, {**SHARED, "teacher": None}, schedule={"use": "bake", "layer": "conv2"}, train={"epochs": 1})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
