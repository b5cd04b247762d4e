import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_stage_resume import interrupt_at
from torch import nn
from training import PLAIN, Command, assert_same_run, metrics, together, train, write

import kdkit
from kdkit.recipe import registry

PLUGINS = registry.load()
ProgressiveSelf, SoftLabels = PLUGINS.schedules["ps_kd"], PLUGINS.losses["soft_labels"]
SOFT = {"use": "soft_labels", "alpha": {"from": 0, "to": 0.8, "epochs": 3}}
HINT = {"use": "hint", "weight": 0.1, "adapter": "linear", "layers": [{"student": "stage3", "teacher": "stage3"}]}
RECIPE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "ps_kd"},
    "losses": [SOFT, HINT],
    "train": {**PLAIN["train"], "epochs": 3},
}


class Students:
    """Hands out a network with batch normalisation, its first layer tapped."""

    def __init__(self):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
        self.network = nn.Sequential(*parts)

    def student(self):
        return kdkit.taps(self.network, ["0"])


def stage_of(models):
    (stage,) = ProgressiveSelf(ProgressiveSelf.Options()).stages(models)
    return stage


def batch_of(step):
    return kdkit.Batch(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(step)), torch.arange(6) % 5, torch.arange(6))


def test_equals_a_hand_made_loop():
    """With a share of a_T (e + 1) / E all through epoch e, but for the first, in which the labels stand alone."""
    models, epochs = Students(), 3
    naive, previous = copy.deepcopy(models.network), None
    stage = stage_of(models)
    ours, theirs = (torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9) for network in (models.network, naive))
    for epoch in range(epochs):
        alpha = 0.8 * (epoch + 1) / epochs
        loss = SoftLabels(SoftLabels.Options(alpha=alpha if epoch else 0.0))
        for step in range(4):
            batch = batch_of(4 * epoch + step)
            (lesson,) = stage.step(batch, kdkit.Moment(epoch, 4 * epoch + step))
            ours.zero_grad()
            loss(lesson.student, *lesson.teachers, batch).backward()
            ours.step()

            target = F.one_hot(batch.labels, 5).float()
            if previous is not None:
                with torch.no_grad():
                    target = (1 - alpha) * target + alpha * previous(batch.inputs).softmax(1)
            theirs.zero_grad()
            (-(target * naive(batch.inputs).log_softmax(1)).sum() / 6).backward()
            theirs.step()
            torch.testing.assert_close(models.network.state_dict(), naive.state_dict())
        stage.after_epoch()
        previous = copy.deepcopy(naive).eval()
    torch.testing.assert_close(stage.buffers[0].module.state_dict(), previous.state_dict())


def test_in_the_first_epoch_the_student_stands_for_its_teacher():
    stage = stage_of(Students())
    (lesson,) = stage.step(batch_of(0))
    (teacher,) = lesson.teachers
    assert torch.equal(teacher.logits, lesson.student.logits) and torch.equal(teacher.features["0"], lesson.student.features["0"])
    assert lesson.student.logits.requires_grad and not teacher.logits.requires_grad and not teacher.features["0"].requires_grad


def test_the_past_student_is_frozen_until_the_epoch_ends():
    models = Students()
    stage = stage_of(models)
    stage.after_epoch()
    previous = stage.buffers[0].module
    before = copy.deepcopy(previous.state_dict())
    assert not previous.training and not any(p.requires_grad for p in previous.parameters())
    optimizer = torch.optim.SGD(models.network.parameters(), lr=0.5)
    for step in range(3):
        batch = batch_of(step)
        (lesson,) = stage.step(batch, kdkit.Moment(1, step))
        assert not lesson.teachers[0].logits.requires_grad and not lesson.teachers[0].features["0"].requires_grad
        F.mse_loss(lesson.student.logits, lesson.teachers[0].logits + 1).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in previous.state_dict().items())
    assert not torch.equal(models.network[0].weight, previous[0].weight)
    stage.after_epoch()
    assert all(torch.equal(value, models.network.state_dict()[name]) for name, value in previous.state_dict().items())


def test_the_plan_says_what_a_step_of_the_later_epochs_costs(tmp_path):
    (stage,) = kdkit.check(write(tmp_path, RECIPE)).stages
    assert (stage.cost.forwards, stage.cost.backwards, stage.cost.teachers) == (1, 1, 1)


def test_says_that_agreement_teaches_nothing_in_the_first_epoch(tmp_path):
    result = train(tmp_path, RECIPE, losses=[{"use": "cross_entropy"}, {"use": "logit_kl"}])
    silent = [warning for warning in result.warnings if "exactly 0" in warning]
    assert silent == ["logit_kl was exactly 0 in all of epoch 1 of stage 'train': nothing is learnt from it"]
    assert all(line["train"]["logit_kl"] > 0 for line in metrics(tmp_path / "run")[1:] if line["kind"] == "epoch" and line["epoch"] > 1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 9])
def test_a_run_that_stops_goes_on_with_the_same_bits(tmp_path, step):
    """At the end of the first epoch, and inside the second."""
    train(tmp_path, RECIPE, into="whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, RECIPE)
    train(tmp_path, RECIPE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    losses = [SOFT, {"use": "hint", "adapter": "linear", "layers": [{"student": "conv2", "teacher": "conv1"}]}]
    path = write(tmp_path, {**SHARED, "teacher": None, "schedule": {"use": "ps_kd"}, "losses": losses})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
