"""What a stage may ask for beside its students and its step."""

import signal
from dataclasses import replace

import pytest
import torch
from training import PLAIN, Command, assert_same_run, lines, metrics, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import batches
from kdkit.runs import opening, training
from kdkit.runs.networks import ModelFactory

ASKING = '''
import kdkit
import torch
from torch import nn


class Memory(nn.Module):
    """A scale that learns; how often each hook was called; the last batch's images."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("epochs", torch.zeros(()))
        self.register_buffer("last", torch.zeros(shape))


class Asking(kdkit.Schedule):
    """The student learns from its scaled answer to another view; images come in pairs of one class."""

    name = "asking"
    scheme = "self"
    needs_teacher = False

    def stages(self, models):
        student, memory = models.student(), Memory((6,))

        def step(batch):
            seen = kdkit.see(student, batch.inputs, {"other": batch.views[0]})
            taught = memory.scale * seen.views["other"].logits.detach() + 0.1 * memory.last
            with torch.no_grad():
                memory.last.copy_(seen.logits.mean(0))
            return [kdkit.Lesson(seen, [kdkit.Outputs(taught)])]

        yield kdkit.Stage(
            "train", [student], step, parts=memory, views=2, arrange=pairs,
            after_step=lambda: memory.steps.add_(1), after_epoch=lambda: memory.epochs.add_(1),
        )


def pairs(order, classes, batch_size):
    """By class, so that neighbours are alike; the first of each pair comes twice."""
    sorted_ = order[classes.argsort(stable=True)]
    return sorted_[::2].repeat_interleave(2)


@kdkit.hookimpl
def kdkit_schedules():
    return [Asking]
'''
RECIPE = {
    **{key: value for key, value in PLAIN.items() if key != "teacher"},
    "plugins": ["asking.py"],
    "schedule": {"use": "asking"},
    "data": {**PLAIN["data"], "augment": {"crop_padding": 2, "flip": 0.5}},
    "run": {"log_steps": 1, "checkpoint_steps": 2},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "asking.py").write_text(ASKING)
    return tmp_path


def first_stage(folder):
    loaded = recipe.load(write(folder, RECIPE))
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    stage = next(iter(loaded.plugins.schedules["asking"](loaded.spec.schedule).stages(factory)))
    return training.build_trainer(loaded, prepared, factory, accelerator, 0, stage), prepared


def test_stage_arranges_images(folder):
    trainer, prepared = first_stage(folder)
    seen = list(batches(prepared.train, trainer.stage, 0))
    assert [len(batch.labels) for batch in seen] == [8] * 6
    for batch in seen:
        assert torch.equal(batch.index[::2], batch.index[1::2])
    later = list(batches(prepared.train, trainer.stage, 0, start=4))
    assert all(torch.equal(one.index, other.index) for one, other in zip(seen[4:], later, strict=True))
    assert not torch.equal(seen[0].index, next(batches(prepared.train, trainer.stage, 1)).index)


def test_stage_views_are_the_same_images_augmented_otherwise(folder):
    trainer, prepared = first_stage(folder)
    one, again = (next(batches(prepared.train, trainer.stage, 3)) for _ in range(2))
    (other,) = one.views
    assert other.shape == one.inputs.shape and not torch.equal(other, one.inputs)
    assert torch.equal(other, again.views[0]) and torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.inputs, next(prepared.train.epoch(3, arrange=trainer.stage.data.arrange)).inputs)
    assert (one.inputs.flatten(1).sort(1)[0] == other.flatten(1).sort(1)[0]).float().mean() > 0.5  # the same pixels, mostly


def test_stage_parts_learn_and_hooks_are_called(folder):
    trainer, _ = first_stage(folder)
    for _ in range(2):
        list(train_epoch(trainer))
    memory = trainer.stage.parts
    assert (memory.steps, memory.epochs) == (12, 2)
    assert memory.scale != 1 and memory.scale.grad is None
    assert any(memory.scale is p for p in trainer.updaters[0].parameters)


def test_stage_hooks_get_the_moment(folder):
    trainer, _ = first_stage(folder)
    seen = []

    def step(batch, moment):
        seen.append(("step", moment))
        return trainer.stage.step(batch, moment)

    trainer.learner._lessons = step
    trainer.stage = replace(
        trainer.stage,
        after_step=lambda moment: seen.append(("after_step", moment)),
        after_epoch=lambda moment: seen.append(("after_epoch", moment)),
    )
    for _ in range(2):
        list(train_epoch(trainer))
    wanted = []
    for epoch in range(2):
        for done in range(6 * epoch, 6 * epoch + 6):
            wanted += [("step", kdkit.Moment(epoch, done)), ("after_step", kdkit.Moment(epoch, done + 1))]
        wanted.append(("after_epoch", kdkit.Moment(epoch + 1, 6 * epoch + 6)))
    assert seen == wanted


def test_stage_state_of_a_schedule_resumes(folder):
    path = write(folder, RECIPE, train={"epochs": 3})
    assert Command(folder, "train", path, "--run", "whole").finish()[0] == 0
    for wanted in (3, 9):
        command = Command(folder, "train", path, "--run", "parts")
        command.wait_for(lambda wanted=wanted: lines(folder / "parts") >= wanted)
        command.send(signal.SIGKILL)
        command.process.join()
    assert Command(folder, "train", path, "--run", "parts").finish()[0] == 0
    assert_same_run(folder / "whole", folder / "parts")


def test_stage_views_and_mixup_are_refused_together(folder):
    mixed = {"epochs": 1, "optimizer": {"lr": 0.1}, "mixup": {"mixup_alpha": 0.2}}
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: train.mixup: stage 'train' compares views"):
        kdkit.check(write(folder, RECIPE, train=mixed))


def test_stage_peers_are_measured_together(folder):
    mutual = (
        ASKING[: ASKING.index("class Memory")]
        + '''
class Peers(kdkit.Schedule):
    """Two peers on labels."""

    name = "peers"
    scheme = "online"
    needs_teacher = False

    def stages(self, models):
        peers = [models.student(), models.student()]
        yield kdkit.Stage("peers", peers, lambda batch: [kdkit.Lesson(p(batch.inputs)) for p in peers], result="best")


@kdkit.hookimpl
def kdkit_schedules():
    return [Peers]
'''
    )
    (folder / "peers.py").write_text(mutual)
    peers = {**RECIPE, "plugins": ["peers.py"], "schedule": {"use": "peers"}, "losses": [{"use": "cross_entropy"}]}
    with pytest.raises(kdkit.RecipeError, match="the best student on validation data; set `data.validation`"):
        kdkit.check(write(folder, peers))
    result = train(folder, peers, data={"validation": 8})
    last = [line for line in metrics(folder / "run") if line["kind"] == "epoch"][-1]
    assert last["ensemble"]["test"] == result.ensemble and len(result.peers) == 1
    validation = [last["validation"]["top1"], last["peers"][0]["validation"]["top1"]]
    chosen = validation.index(max(validation))
    assert result.validation["top1"] == max(validation)
    assert result.test == [last["test"], last["peers"][0]["test"]][chosen]
    assert weights(folder / "run")
