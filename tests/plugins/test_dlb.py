import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_engine import trainer_of
from test_stage_resume import interrupt_at
from training import PLAIN, Command, assert_same_run, metrics, together, train, write

import kdkit
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import batches
from kdkit.recipe import registry

PAIR = [{"student": "stage2", "teacher": "stage2"}]
RECIPE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "dlb"},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 3.0}],
    "data": {**PLAIN["data"], "augment": {"crop_padding": 2, "flip": 0.5}},
}
RELATION = [*RECIPE["losses"], {"use": "rkd_distance", "layers": PAIR}]
FEATURES = [*RELATION, {"use": "hint", "weight": 0.1, "adapter": "linear", "layers": PAIR}]
DLB = registry.load().schedules["dlb"]


def arranged(images, batch_size):
    """An epoch's batches."""
    (stage,) = DLB(DLB.Options()).stages(type("Students", (), {"student": lambda self: None})())
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    return order, torch.split(stage.data.arrange(order, order % 3, batch_size), batch_size)


@pytest.mark.parametrize(("images", "batch_size"), [(48, 8), (44, 8), (8, 8), (20, 2)])
def test_half_of_each_batch_was_in_the_one_before(images, batch_size):
    order, found = arranged(images, batch_size)
    assert sum(map(len, found)) == images
    for before, after in zip(found, found[1:], strict=False):
        assert after[0::2].tolist() == before[1::2].tolist()[: len(after) // 2]
    first, new = found[0], torch.cat([batch[1::2] for batch in found])
    assert len(set(first.tolist())) == batch_size and len(set(new.tolist())) == images // 2
    assert len({int(image) for batch in found for image in batch}) == images // 2 + batch_size // 2


@pytest.mark.parametrize(("images", "batch_size"), [(48, 7), (47, 8)])
def test_what_has_no_halves_is_refused(images, batch_size):
    with pytest.raises(kdkit.RunError, match="must be even"):
        arranged(images, batch_size)


def test_steps_equal_a_plain_loop(tmp_path):
    plainly = {"epochs": 2, "optimizer": {"lr": 0.02, "name": "momentum", "momentum": 0.9}, "lr_schedule": {"name": "constant"}}
    trainer, _ = trainer_of(tmp_path, RECIPE, losses=RELATION, train=plainly)
    (tapped,) = trainer.stage.students
    naive = kdkit.taps(copy.deepcopy(tapped.module).train(), ["stage2"])
    optimizer = torch.optim.SGD(naive.module.parameters(), lr=0.02, momentum=0.9)
    remembered = 0
    for epoch in range(2):
        known = {}
        seen = list(batches(trainer.loader, trainer.stage, epoch))
        for batch, values in zip(seen, train_epoch(trainer), strict=True):
            answer = naive(tapped.adapt(batch.inputs))
            z, f = answer.logits, answer.features["stage2"]
            value = F.cross_entropy(z, batch.labels)
            old = [i for i, image in enumerate(batch.index.tolist()) if image in known]
            assert old in ([], [0, 2, 4, 6])
            if old:
                taught, taught_f = (torch.stack([known[int(batch.index[i])][part] for i in old]) for part in (0, 1))
                q, p = (taught / 3).softmax(1), (z[old] / 3).softmax(1)
                value = value + 9 * (q * (q / p).log()).sum() / 4 + distances(f[old], taught_f)
                remembered += 1
            assert float(values[0].total.detach()) == pytest.approx(float(value.detach()), rel=1e-3)
            known = {int(image): (z[i].detach(), f[i].detach()) for i, image in enumerate(batch.index) if i % 2}
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert remembered == 10  # all but the first step of each epoch
    for name, value in naive.module.state_dict().items():
        torch.testing.assert_close(tapped.module.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def distances(f_s, f_t):
    """RKD's, by pairs."""
    found = []
    for f in (f_s.flatten(1), f_t.flatten(1)):
        pairs = torch.stack([(f[i] - f[j]).norm() for i in range(4) for j in range(4) if i != j])
        found.append(pairs / pairs.mean())
    a, b = found
    return F.smooth_l1_loss(a, b, reduction="sum") / 16


def test_what_is_remembered_is_a_constant(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE, losses=FEATURES)
    trainer.learner.train()
    first, second, *_ = batches(trainer.loader, trainer.stage, 0)
    (lesson,) = trainer.stage.step(first)
    (teacher,) = lesson.teachers
    assert torch.equal(teacher.logits, lesson.student.logits) and not teacher.logits.requires_grad
    new = lesson.supervised.student.logits[1::2].detach()
    (lesson,) = trainer.stage.step(second)
    (teacher,) = lesson.teachers
    assert torch.equal(teacher.logits, new) and not teacher.features["stage2"].requires_grad
    assert lesson.student.logits.requires_grad and lesson.batch.index.tolist() == first.index[1::2].tolist()
    trainer.stage.after_epoch()
    (lesson,) = trainer.stage.step(second)
    assert torch.equal(lesson.teachers[0].logits, lesson.student.logits)


def test_a_stop_changes_nothing(tmp_path):
    """In the middle of an epoch, where something is remembered, and at its end."""
    train(tmp_path, RECIPE, into="whole", losses=FEATURES)
    for step in (3, 6, 10):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(kdkit.Interrupted):
                train(tmp_path, RECIPE, losses=FEATURES)
    train(tmp_path, RECIPE, losses=FEATURES)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    steps = [line for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert [line["step"] for line in steps if line["terms"]["logit_kl"] < 1e-6] == [1, 7]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    path = write(tmp_path, {**SHARED, "teacher": None}, schedule={"use": "dlb"})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
