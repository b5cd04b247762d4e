import copy
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_stage_resume import interrupt_at
from torch import nn
from training import PLAIN, Command, assert_same_run, lines, metrics, together, train, weights, write

import kdkit
from kdkit.recipe import registry

MeanTeacher = registry.load().schedules["mean_teacher"]
HINT = {"use": "hint", "weight": 0.1, "adapter": "linear", "layers": [{"student": "stage3", "teacher": "stage3"}]}
RECIPE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "mean_teacher", "decay": 0.9},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_mse"}, HINT],
}


class Students:
    """Hands out a network with batch normalisation, its first layer tapped."""

    def __init__(self):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
        self.network = nn.Sequential(*parts)

    def student(self):
        return kdkit.taps(self.network, ["0"])


def stage_of(models, **options):
    (stage,) = MeanTeacher(MeanTeacher.Options(**options)).stages(models)
    return stage


def batch_of(step, views=1):
    generator = torch.Generator().manual_seed(step)
    first, *others = (torch.rand(6, 3, 8, 8, generator=generator) for _ in range(1 + views))
    return kdkit.Batch(first, torch.arange(6) % 5, torch.arange(6), tuple(others))


def value_of(z, f, taught_z, taught_f, labels):
    return F.cross_entropy(z, labels) + F.mse_loss(z, taught_z) + F.mse_loss(f, taught_f)


@pytest.mark.parametrize("second_view", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_equals_a_hand_made_loop(decay, second_view):
    models = Students()
    naive, average = copy.deepcopy(models.network), copy.deepcopy(models.network)
    stage = stage_of(models, decay=decay, second_view=second_view)
    ours, theirs = (torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9) for network in (models.network, naive))
    for n in range(1, 7):
        batch = batch_of(n)
        (lesson,) = stage.step(batch)
        (teacher,) = lesson.teachers
        ours.zero_grad()
        value_of(lesson.student.logits, lesson.student.features["0"], teacher.logits, teacher.features["0"], batch.labels).backward()
        ours.step()
        stage.after_step(kdkit.Moment(0, n))

        images = batch.views[0] if second_view else batch.inputs
        average.eval()
        with torch.no_grad():
            taught_f, taught_z = average[0](images), average(images)
        theirs.zero_grad()
        value_of(naive(batch.inputs), naive[0](batch.inputs), taught_z, taught_f, batch.labels).backward()
        theirs.step()
        d = min(1 - 1 / (n + 1), decay)
        for name, old in average.state_dict().items():
            new = naive.state_dict()[name]
            old.copy_(d * old + (1 - d) * new if old.is_floating_point() else new)

        torch.testing.assert_close(models.network.state_dict(), naive.state_dict())
        torch.testing.assert_close(stage.buffers[0].module.state_dict(), average.state_dict())


def test_begins_as_the_plain_mean_of_all_weights_so_far():
    models = Students()
    stage, seen = stage_of(models, decay=0.999), [copy.deepcopy(models.network.state_dict())]
    for n in range(1, 6):
        with torch.no_grad():
            for value in models.network.parameters():
                value.add_(torch.randn_like(value))
        stage.after_step(kdkit.Moment(0, n))
        seen.append(copy.deepcopy(models.network.state_dict()))
    for name, value in stage.buffers[0].module.named_parameters():
        torch.testing.assert_close(value, torch.stack([state[name] for state in seen]).mean(0))


def test_only_the_student_learns():
    models = Students()
    stage = stage_of(models)
    (lesson,) = stage.step(batch_of(0))
    (teacher,) = lesson.teachers
    assert lesson.student.logits.requires_grad and lesson.student.features["0"].requires_grad
    assert not teacher.logits.requires_grad and not teacher.features["0"].requires_grad
    average = stage.buffers[0].module
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    before = copy.deepcopy(average.state_dict())
    models.network.train()
    stage.step(batch_of(1))
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert not {id(p) for p in average.parameters()} & {id(p) for p in models.network.parameters()}


def test_the_average_sees_the_second_view():
    batch = batch_of(0)
    other = kdkit.Batch(batch.inputs, batch.labels, batch.index, (batch.inputs,))
    for second_view, views in ((True, 2), (False, 1)):
        stage = stage_of(Students(), second_view=second_view)
        ours, same = (stage.step(b)[0].teachers[0].logits for b in (batch, other))
        assert stage.data.views == views and torch.equal(ours, same) is not second_view


def test_a_run_that_stops_goes_on_with_the_same_bits(tmp_path):
    train(tmp_path, RECIPE, into="whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, RECIPE)
    train(tmp_path, RECIPE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_decay_matters(tmp_path):
    for name, decay in (("slow", 0.9), ("none", 0.0)):
        train(tmp_path, RECIPE, into=name, schedule={"decay": decay})
    assert not torch.equal(*(weights(tmp_path / name)["conv1.weight"] for name in ("slow", "none")))
    assert {"logit_mse", "hint"} <= set(metrics(tmp_path / "slow")[0]["terms"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    losses = [loss for loss in SHARED["losses"] if loss["use"] != "at"]
    path = write(tmp_path, {**SHARED, "teacher": None, "schedule": RECIPE["schedule"], "losses": losses})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_with_batch_statistics_stop_and_go_on(tmp_path):
    """Each process has its own statistics after a step; the averages must have one and the same."""
    path = write(tmp_path, RECIPE, train={"epochs": 6, "evaluate_every": 3})
    whole = together(tmp_path, "train", path, "--run", "whole")
    assert [command.finish()[0] for command in whole] == [0, 0]
    stopped = together(tmp_path, "train", path, "--run", "run")
    assert stopped[0].wait_for(lambda: lines(tmp_path / "run") >= 15), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)
    assert [command.finish()[0] for command in stopped] == [143, 143]
    again = together(tmp_path, "train", path, "--run", "run")
    assert [command.finish()[0] for command in again] == [0, 0]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_mixup_is_refused_with_two_views_only(tmp_path):
    mixed = {"train": {"mixup": {"mixup_alpha": 0.2}}}
    with pytest.raises(kdkit.RecipeError, match="compares views of single images"):
        kdkit.check(write(tmp_path, RECIPE, **mixed))
    train(tmp_path, RECIPE, schedule={"second_view": False}, **mixed)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["nll"] > 0
