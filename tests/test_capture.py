"""A step that is recorded and repeated gives what the plain loop gives; what cannot be recorded is found."""

import itertools
import random

import pytest
import torch
from test_every_loss_and_schedule import BASE, FOR_ANY_NETWORK, FOR_CLASSES, MAKING, PLUGINS, REFUSED, SCHEDULES, WIDER, options
from test_lockstep import VARIANTS, alone, jobs
from training import assert_same_run, merged, train, write

from kdkit import recipe
from kdkit.engine import capture
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import Trainer
from kdkit.randomness import reseed
from kdkit.runs import opening, training
from kdkit.runs.networks import ModelFactory
from kdkit.study import shared
from kdkit.study.lockstep import train_together
from kdkit.testing.replay import Replays

STEPS = 4
"""Of each epoch: the first runs, the second is watched, the third is recorded."""
ALL = {
    **BASE,
    "data": {
        **BASE["data"],
        "dataset": {**BASE["data"]["dataset"], "train": 8 * STEPS},
        "augment": {"crop_padding": 1, "flip": 0.5},
    },
    "train": {
        "device": "cpu",
        "epochs": 2,
        "optimizer": {"lr": 1e-3, "args": {"fused": True}},
        "lr_schedule": {"warmup_epochs": 1},
        "clip_grad": 1.0,
    },
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A recipe whose run has snapshots."""
    folder = tmp_path_factory.mktemp("teacher")
    alone = {
        **BASE,
        "name": "teacher",
        "student": WIDER,
        "schedule": {"use": "supervised"},
        "losses": [{"use": "cross_entropy"}],
    }
    train(folder, alone, into="runs/teacher")
    return folder / "recipe.yaml"


def two_epochs(path, record):
    """Values and weights of every stage, and how its steps were taken; `record(trainer, stage)` sets that up."""
    loaded = recipe.load(path)
    # first, as their recipes may name another device
    teachers = training.trained_teachers(loaded, path.parent / "run", quiet=True)
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, prepared.info, teachers, device=accelerator.device)
    carried, values, states, takes = {}, [], [], []
    schedule = loaded.plugins.schedules[loaded.spec.schedule.use](loaded.spec.schedule)
    stages = schedule.stages(factory)
    for number in itertools.count():
        reseed(0, "stage", number)
        if (stage := next(stages, None)) is None:
            break
        trainer = training.build_trainer(loaded, prepared, factory, accelerator, number, stage, carried)
        record(trainer, stage)
        for value in itertools.chain(*train_epoch(trainer), *train_epoch(trainer)):
            values.append({name: float(term) for name, term in {**value.terms, "total": value.total}.items()})
        states += [{name: x.clone() for name, x in trainer.learner.state_dict().items() if isinstance(x, torch.Tensor)}]
        states += [network.state_dict() for network in trainer.deployed()]
        takes.append(trainer.take)
        trainer.close()
    factory.verify_finite()
    return values, states, takes


def plainly(trainer, stage):
    """Leave the trainer as it is."""


def on_tape(trainer, stage):
    """Record the steps on the processor."""
    trainer.take = capture.Captured(Replays(), lambda reason: None, modules=[trainer.learner])


def compare(path, record=on_tape, rtol=1e-4, atol=1e-6):
    """Assert that a recorded run is the plain one; the reasons of the stages that were not recorded.

    A learning rate or a ramp in a tensor is rounded to fp32, so the last bits may differ.
    """
    values, states, _ = two_epochs(path, plainly)
    again, others, takes = two_epochs(path, record)
    for step, (one, other) in enumerate(zip(values, again, strict=True)):
        assert other == pytest.approx(one, rel=rtol, abs=atol), f"step {step}"
    for one, other in zip(states, others, strict=True):
        for name, x in one.items():
            torch.testing.assert_close(other[name], x, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for take in takes:
        assert take.reason is not None or take.records
    return [take.reason for take in takes if take.reason is not None]


def written(folder, schedule, losses, teacher, combine=None, cache=None, **changes):
    """A recipe with these changes to `ALL`."""
    asked = {"combine": combine} if combine else SCHEDULES.get(schedule, {})
    spec = {**ALL, "schedule": {"use": schedule, **asked}, "losses": losses}
    if PLUGINS.schedules[schedule].needs_teacher and "teachers" not in changes:
        spec["teacher"] = {"recipe": str(teacher), **({"cache": cache} if cache else {})}
    return write(folder, merged(spec, changes))


LABELS = {"use": "cross_entropy", "name": "labels"}
PLAIN_SCHEDULES = {"dlb": "that is replaced from step to step"}
"""Schedules that cannot be recorded, and why."""
MIXED = ("byot", "logit_kl", "hint", "rkd_distance", "mgd")


def under(schedule, folder, teacher, **changes):
    """A recipe of losses of all kinds under a schedule."""
    names = [loss for loss in MIXED if (schedule, loss) not in REFUSED]
    losses = [LABELS, *({"use": loss, **options(loss, schedule)} for loss in names)]
    if schedule in MAKING:  # without images there are no labels, and nothing to augment
        losses = [loss for loss in losses if PLUGINS.losses[loss["use"]].knowledge != "labels"]
        changes = merged({"data": {"synthetic_batches": 3, "augment": None}}, changes)
    return written(folder, schedule, losses, teacher, **changes)


FEW = ["fast", "mutual", "staged"]


@pytest.mark.parametrize("schedule", FEW + [pytest.param(each, marks=pytest.mark.slow) for each in FOR_ANY_NETWORK if each not in FEW])
def test_every_schedule_recorded(schedule, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    reasons = compare(under(schedule, tmp_path, teacher))
    if schedule in PLAIN_SCHEDULES:
        assert reasons and PLAIN_SCHEDULES[schedule] in reasons[0]
    else:
        assert not reasons


NOT_TOGETHER = {"byot", "frskd", "norm", "simkd"}
"""Losses that put another network in the student's place, or name a layer that others do not."""
OF_ONE_WIDTH = {"pod"}  # the teacher here is wider
GROUPS = [[loss for loss in FOR_CLASSES[number::6] if loss not in NOT_TOGETHER | OF_ONE_WIDTH] for number in range(6)]
GROUPS += [[loss] for loss in sorted(NOT_TOGETHER)]


def beside_labels(group, folder, teacher, **changes):
    """A recipe of some losses beside the labels."""
    schedule = "staged" if any(PLUGINS.losses[loss].needs_views for loss in group) else "offline"
    losses = [LABELS, *({"use": loss, **options(loss, schedule)} for loss in group)]
    return written(folder, schedule, losses, teacher, **changes)


@pytest.mark.first(4)
@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_every_loss_recorded(group, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    assert not compare(beside_labels(group, tmp_path, teacher))


CHANGING = {
    "ramps": {
        "losses": [
            {"use": "cross_entropy", "weight": {"from": 0.1, "to": 1, "epochs": 2}},
            {"use": "logit_kl", "temperature": {"from": 1, "to": 4, "epochs": 2, "shape": "cosine"}},
            {"use": "ctkd"},
        ]
    },
    "averages": {"train": {"ema": {"decay": 0.9, "warmup": True}}},
    "accumulation": {"train": {"accumulate": 2, "epochs": 2}, "data": {"dataset": {"train": 64}}},
    "a smaller last batch": {"data": {"dataset": {"train": 8 * STEPS + 4}}, "train": {"epochs": 8}},
    "mixup": {"train": {"mixup": {"mixup_alpha": 0.4, "off_epoch": 1}}},
    "adamw": {"train": {"optimizer": {"name": "adamw", "args": {"fused": True, "capturable": True}}}},
    "several teachers": {"combine": "probabilities", "teachers": [{"name": "a", **WIDER}, {"name": "b", **WIDER}]},
    "one teacher at random": {"combine": "random", "teachers": [{"name": "a", **WIDER}, {"name": "b", **WIDER}]},
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_reaches_a_recorded_step(name, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    changes = {"losses": [LABELS, {"use": "logit_kl"}], **CHANGING[name]}
    losses = changes.pop("losses")
    assert not compare(written(tmp_path, "offline", losses, teacher, **changes))


def count(loss, z):
    loss.calls += 1
    return loss.calls


def cheating(loss, student, teacher, batch):
    z = student.logits
    return CHEATS[loss.how](loss, z) * z.square().mean()


CHEATS = {
    "in one step and": count,
    "the host reads a value": lambda loss, z: float(z.detach().mean()),
    "random numbers with `random`": lambda loss, z: random.random(),
    "by aten.index": lambda loss, z: z[z > 0].mean().detach(),
}


@pytest.mark.parametrize("says", CHEATS)
def test_what_would_be_frozen_is_found(says, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    path = written(tmp_path, "offline", [LABELS, {"use": "logit_mse"}], teacher)
    loss = recipe.load(path).plugins.losses["logit_mse"]
    monkeypatch.setattr(loss, "how", says, raising=False)
    monkeypatch.setattr(loss, "calls", 0, raising=False)
    monkeypatch.setattr(loss, "forward", cheating)
    (reason,) = compare(path)
    assert says.replace("LogitMse", loss.__name__) in reason


HOOKED = """
import kdkit

class Hooked(kdkit.Schedule):
    'Counts in a hook.'

    name = "hooked"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        student, teacher = models.student(), models.teacher()
        self.seen = {{"count": 0}}

        def step(batch):
            answer = teacher(batch.inputs)
            return [kdkit.Lesson(student(batch.inputs), [answer.map(lambda x: x * {factor})])]

        def hook():
            self.seen["count"] += 1

        yield kdkit.Stage("hooked", [student], step, {hook}=hook)

@kdkit.hookimpl
def kdkit_schedules():
    return [Hooked]
"""
HOOKS = {
    "a step": ("after_step", "(1 + self.seen['count'])", "in one step and"),
    "an epoch": ("after_epoch", "(1 + self.seen['count'])", None),
    "nothing": ("after_step", "(1 + 0 * self.seen['count'])", None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_changes_the_step_is_noticed(name, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    hook, factor, says = HOOKS[name]
    (tmp_path / "hooked.py").write_text(HOOKED.format(hook=hook, factor=factor))
    spec = {**ALL, "schedule": {"use": "hooked"}, "losses": [LABELS, {"use": "logit_kl"}], "teacher": {"recipe": str(teacher)}}
    reasons = compare(write(tmp_path, {**spec, "plugins": ["hooked.py"]}))
    assert [says in reason for reason in reasons] == [True] * bool(says)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", ["response", "accumulated", "cached", "two_stages"])
def test_recorded_steps_in_lockstep_are_those_of_a_run_alone(name, tmp_path, monkeypatch):
    def begin(trainer, wanted, say):
        on_tape(trainer, trainer.stage)
        takes.append(trainer.take)

    def with_tapes(self, data, world=1, *, records=False):
        plain(self, data, world)
        self._graphs = Replays()

    plain, takes = shared.Sharing.__init__, []
    monkeypatch.setattr(Trainer, "capture", begin)
    monkeypatch.setattr(shared.Sharing, "__init__", with_tapes)
    fused = {"train": {"device": "cpu", "optimizer": {"args": {"fused": True}}}}
    found = jobs(tmp_path, variants={key: merged(VARIANTS[name], fused) for key in ("one", "two")})
    assert all(outcome.result for outcome in train_together(found))
    assert_same_run(alone(tmp_path, found[0]), found[0].folder)
    assert all(take.reason is None for take in takes) and any(take.records for take in takes)
