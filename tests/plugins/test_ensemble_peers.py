"""Peers that learn from an ensemble of their own logits."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from test_distributed import assert_alike
from test_distributed import recipe as shared
from test_engine import trainer_of
from training import PLAIN, Command, merged, together

from kdkit.engine.loop import train_epoch
from kdkit.recipe import registry

RECIPE = merged(PLAIN, {"teacher": None, "schedule": {"use": "ensemble_peers", "size": 3}})
lowest = sys.modules[registry.load().schedules["ensemble_peers"].__module__].lowest


def grid(count, parts=40):
    """Convex weights, evenly spread."""
    for row in itertools.product(range(parts + 1), repeat=count - 1):
        if sum(row) <= parts:
            yield torch.tensor([*row, parts - sum(row)]) / parts


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("told", [0.0, 2.0], ids=["all alike", "one knows"])
def test_the_mixture_has_the_lowest_loss(count, scale, told):
    torch.manual_seed(count)
    logits, labels = scale * torch.randn(count, 16, 5), torch.arange(16) % 5
    logits[0] += told * scale * F.one_hot(labels, 5)
    weights = lowest(logits, labels)
    assert weights.sum() == pytest.approx(1) and weights.min() >= 0

    def loss(w):
        return float(F.cross_entropy((w[:, None, None] * logits).sum(0), labels))

    assert loss(weights) <= min(map(loss, grid(count))) * (1 + 1e-3) + 1e-6
    shares = F.one_hot(labels, 5).float()
    torch.testing.assert_close(lowest(logits, shares), weights)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_and_extreme_logits_give_finite_weights(scale):
    logits = scale * torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    weights = lowest(logits, torch.arange(8) % 4)
    assert weights.isfinite().all() and weights.sum() == pytest.approx(1)
    logits[0] *= -1
    assert lowest(logits, torch.arange(8) % 4).isfinite().all()


@pytest.mark.parametrize("target", ["mean", "best", "lowest"])
def test_all_learn_from_one_answer(tmp_path, target):
    hint = {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule={"target": target}, losses=[*PLAIN["losses"], hint])
    batch = next(trainer.loader.epoch(0))
    lessons = trainer.stage.step(batch)
    own = [lesson.student.logits.detach() for lesson in lessons]
    losses = torch.stack([F.cross_entropy(z, batch.labels) for z in own])
    expected = {"mean": sum(own) / 3, "best": own[int(losses.argmin())]}
    taught = lessons[0].teachers[0].logits
    if target in expected:
        torch.testing.assert_close(taught, expected[target])
    else:
        assert F.cross_entropy(taught, batch.labels) <= min(losses.min(), F.cross_entropy(expected["mean"], batch.labels)) + 1e-5
    for k, lesson in enumerate(lessons):
        assert len(lesson.teachers) == 2
        assert all(torch.equal(teacher.logits, taught) and not teacher.logits.requires_grad for teacher in lesson.teachers)
        others = [other.student.features["stage3"] for j, other in enumerate(lessons) if j != k]
        assert all(torch.equal(a.features["stage3"], b) for a, b in zip(lesson.teachers, others, strict=True))


def test_each_peer_sees_a_view_of_its_own(tmp_path):
    augment = {"augment": {"crop_padding": 2}}
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule={"own_views": True}, data=augment)
    assert trainer.stage.data.views == 3
    seen = []
    for student in trainer.stage.students:
        student.adapt.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    next(train_epoch(trainer))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["best", "lowest"])
def test_two_processes_equal_one(tmp_path, target):
    schedule = {"use": "ensemble_peers", "target": target}
    path = shared(tmp_path, teacher=None, schedule=schedule, losses=[{"use": "cross_entropy"}, {"use": "logit_kl"}])
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0], commands[0].log.read_text()
    assert_alike(tmp_path / "two", tmp_path / "one")
