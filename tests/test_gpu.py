"""What only a CUDA device can show: recorded steps, precisions, and that results go on to the same numbers."""

import pytest
import torch
from safetensors.torch import load_file
from test_capture import (  # noqa: F401
    FOR_ANY_NETWORK,
    GROUPS,
    LABELS,
    PLAIN_SCHEDULES,
    beside_labels,
    compare,
    plainly,
    teacher,
    two_epochs,
    under,
    written,
)
from test_capture_of_tasks import ON_CPU, RECIPES, prepared
from test_cifar_recipes import ALL_METHODS, FILES, TINY
from test_lockstep import VARIANTS, alone, jobs

import kdkit
from kdkit import recipe
from kdkit.engine.trainer import Trainer
from kdkit.errors import Interrupted
from kdkit.runs import stage
from kdkit.study.lockstep import train_together

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = {"device": "cuda"}
PLAIN_LOSSES = {"kdsvd": ""}
"""Losses that cannot be recorded on the device, and why."""
SPREAD = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Relative spread of values between two runs, as some kernels add in any order."""


def on_device(trainer, stage):
    """Record the steps as the recipe does."""
    trainer.capture(True, lambda reason: None)


@pytest.mark.parametrize("precision", SPREAD)
@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_recorded_losses_are_the_plain_ones(group, precision, teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    spread = SPREAD[precision]
    path = beside_labels([loss for loss in group if loss not in PLAIN_LOSSES], tmp_path, teacher, train={**DEVICE, "precision": precision})
    assert not compare(path, on_device, rtol=spread, atol=spread)


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_what_cannot_be_recorded_runs_as_before(loss, teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    (reason,) = compare(beside_labels([loss], tmp_path, teacher, train=DEVICE), on_device, rtol=1e-3, atol=1e-3)
    print(f"MEASURED {loss}: {reason}")
    assert PLAIN_LOSSES[loss] in reason


@pytest.mark.parametrize("schedule", FOR_ANY_NETWORK)
def test_a_recorded_schedule_is_the_plain_one(schedule, teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    reasons = compare(under(schedule, tmp_path, teacher, train=DEVICE), on_device, rtol=1e-3, atol=1e-3)
    assert bool(reasons) == (schedule in PLAIN_SCHEDULES), reasons


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - ON_CPU))
def test_tasks_balances_and_compressed_students_are_recorded(name, tmp_path):
    path, reason = prepared(name, tmp_path, DEVICE)
    reasons = compare(path, on_device, rtol=1e-3, atol=1e-3)
    assert bool(reasons) == bool(reason) and all(reason in one for one in reasons)


DRAWN = {"crd", "mgd", "vitkd", "total"}
"""Terms with random masks or negatives, which differ between devices."""


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_values_are_those_of_the_processor(group, teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    found = {}
    for device in ("cpu", "cuda"):
        path = beside_labels(group, tmp_path, teacher, train={"device": device})
        first = two_epochs(path, plainly)[0][0]
        found[device] = {name: value for name, value in first.items() if name not in DRAWN}
    assert found["cuda"] == pytest.approx(found["cpu"], rel=2e-3, abs=1e-4)


def weights(folder):
    return load_file(folder / "student.safetensors")


def largest_difference(one, other):
    one, other = weights(one), weights(other)
    return max(float((one[name].float() - x.float()).abs().max()) for name, x in other.items())


@pytest.mark.parametrize("capture", [True, False])
def test_a_run_that_was_stopped_goes_on(capture, teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    pair = {"layers": [{"student": "penultimate", "teacher": "penultimate"}]}
    losses = [LABELS, {"use": "logit_kl"}, {"use": "crd", "negatives": 4, "size": 4, **pair}]
    averaged = {"precision": "fp16", "accumulate": 2, "ema": {"decay": 0.9, "warmup": True}}
    changes = {
        "data": {"dataset": {"train": 96}},
        "train": {**DEVICE, **averaged, "capture": capture},
        "run": {"log_steps": 1, "checkpoint_steps": 2},
    }
    path = written(tmp_path, "offline", losses, teacher, **changes)
    kdkit.train(path, folder=tmp_path / "whole", quiet=True)
    steps = []

    def stops(self):
        steps.append(1)
        return len(steps) == 7

    with monkeypatch.context() as patch:
        patch.setattr(stage.StageRun, "_must_stop", stops)
        with pytest.raises(Interrupted):
            kdkit.train(path, folder=tmp_path / "parts", quiet=True)
    kdkit.train(path, folder=tmp_path / "parts", quiet=True)
    worst = largest_difference(tmp_path / "whole", tmp_path / "parts")
    print(f"MEASURED largest difference after going on, capture {capture}: {worst}")
    assert worst < 2e-2


def test_lockstep_is_as_alone(tmp_path):
    names = ("alone", "response", "feature", "relation", "average", "memory", "accumulated", "cached")
    together = jobs(tmp_path, variants={name: VARIANTS[name] for name in names})
    assert all(outcome.result for outcome in train_together(together))
    for job in together:
        worst = largest_difference(job.folder, alone(tmp_path, job))
        print(f"MEASURED {job.folder.name}, largest difference to a run alone: {worst}")
        assert worst < 2e-2


def test_a_cached_teacher_is_recorded_around(teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(teacher.parent)
    path = written(tmp_path, "offline", [LABELS, {"use": "logit_kl"}], teacher, cache={"views": 1}, train={**DEVICE, "epochs": 3})
    taken = []
    begin = Trainer.capture

    def noted(self, wanted, say):
        begin(self, wanted, taken.append)
        taken.append(self.take)

    monkeypatch.setattr(Trainer, "capture", noted)
    kdkit.train(path, folder=tmp_path / "run", quiet=True)
    (take,) = taken
    assert take.reason is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == ALL_METHODS], ids=lambda path: path.stem)
def test_a_published_recipe_trains_in_half_precision(path, precision, tmp_path):
    changes = {
        "data.dataset": {**TINY, "train": 24},
        "data.batch_size": 4,
        "train.epochs": 1,
        "train.device": "cuda",
        "train.precision": precision,
        "run.log_steps": 1,
    }
    found = recipe.load(path)
    if found.spec.teacher:
        # batch statistics, as those of a network that has learnt nothing do not hold its values back
        changes["teacher"] = {"model": f"cifar/{path.parent.name.split('-')[0]}", "mode": "train", "precision": precision}
    changes |= {f"schedule.stages.{i}.epochs": 1 for i in range(len(getattr(found.spec.schedule, "stages", ())))}
    kdkit.train(path, overrides=changes, folder=tmp_path, quiet=True)
