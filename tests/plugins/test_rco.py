"""The teacher as it was along its own training teaches in turn."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training import PLAIN, Command, assert_same_run, lines, metrics, together, weights, write

import kdkit
from kdkit import recipe
from kdkit.engine.accelerator import build_accelerator
from kdkit.recipe import registry
from kdkit.runs import opening, training
from kdkit.runs.checkpoints import Checkpoints
from kdkit.runs.folder import RunFolder
from kdkit.runs.networks import ModelFactory

Rco = registry.load().schedules["rco"]
TRAIN = {"epochs": 4, "optimizer": {"name": "momentum", "lr": 0.1}, "lr_schedule": {"name": "constant"}}
TAUGHT = {
    **PLAIN,
    "name": "taught",
    "schedule": {"use": "supervised"},
    "student": {"model": "mlp/16"},
    "teacher": None,
    "losses": [{"use": "cross_entropy"}],
    "train": TRAIN,
    "run": {"snapshots": 2},
}
PUPIL = {
    **PLAIN,
    "name": "pupil",
    "student": {"model": "mlp/6"},
    "teacher": {"recipe": "teacher.yaml"},
    "schedule": {"use": "rco", "anchors": [2], "epochs": 1},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 1}],
    "train": {**TRAIN, "epochs": 2},
}


def recipes(folder, taught=None, **changes):
    """The teacher's recipe and the pupil's."""
    write(folder, TAUGHT, "teacher.yaml", **(taught or {}))
    return write(folder, PUPIL, **changes)


def snapshots(run):
    return sorted(str(path.relative_to(run / "snapshots")) for path in (run / "snapshots").rglob("*.safetensors"))


def test_snapshots_are_the_weights_of_their_epochs(tmp_path):
    whole = kdkit.train(write(tmp_path, TAUGHT, train={"ema": {"decay": 0.5}}), folder=tmp_path / "run", quiet=True)
    assert snapshots(tmp_path / "run") == ["train/epoch-0002.safetensors", "train/epoch-0004.safetensors"]
    kept = RunFolder(whole.folder).snapshots()
    assert list(kept) == [2, 4]
    last, student = load_file(kept[4]), weights(tmp_path / "run")
    assert all(torch.equal(last[key], value) for key, value in student.items())
    shorter = kdkit.train(write(tmp_path, TAUGHT, train={"ema": {"decay": 0.5}, "epochs": 2}), folder=tmp_path / "short", quiet=True)
    assert all(torch.equal(load_file(kept[2])[key], value) for key, value in weights(shorter.folder).items())


def test_snapshots_change_nothing(tmp_path):
    kept = recipe.load(write(tmp_path, TAUGHT))
    assert kept.fingerprint == recipe.load(write(tmp_path, TAUGHT, run={"snapshots": None})).fingerprint
    kdkit.train(write(tmp_path, TAUGHT), folder=tmp_path / "kept", quiet=True)
    kdkit.train(write(tmp_path, TAUGHT, run={"snapshots": None}), folder=tmp_path / "plain", quiet=True)
    assert_same_run(tmp_path / "kept", tmp_path / "plain")
    assert not (tmp_path / "plain" / "snapshots").exists()


def test_of_several_stages_those_of_the_last_count(tmp_path):
    plans = [{"name": "first", "epochs": 3}, {"name": "second", "epochs": 2}]
    changes = {"teacher": {"model": "mlp/16"}, "schedule": {"use": "staged", "stages": plans}}
    kdkit.train(write(tmp_path, TAUGHT, run={"snapshots": 1}, **changes), folder=tmp_path / "run", quiet=True)
    assert len(snapshots(tmp_path / "run")) == 5
    kept = RunFolder(tmp_path / "run").snapshots()
    assert list(kept) == [1, 2] and {path.parent.name for path in kept.values()} == {"second"}


def test_the_route_is_plain_torch_code_in_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipes(tmp_path, schedule={"anchors": [2, 4]})
    kdkit.train(path, quiet=True)
    made = tmp_path / "runs" / "taught"
    loaded = recipe.load(path)
    accelerator = build_accelerator(loaded.spec.train)
    prepared = opening.open_data(loaded, accelerator)
    trained = training.trained_teachers(loaded, tmp_path / "runs" / "pupil", quiet=True)
    factory = ModelFactory(loaded, prepared.info, trained, device=accelerator.device)
    student, teacher = factory.student(), factory.teacher()
    stages = [("snapshots/train/epoch-0002", 1), ("snapshots/train/epoch-0004", 1), ("student", 2)]
    for file, epochs in stages:
        state = load_file(made / f"{file}.safetensors", device=str(accelerator.device))
        optimizer = torch.optim.SGD(student.module.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            for batch in prepared.train.epoch(epoch):
                p = torch.func.functional_call(teacher.module, state, (teacher.adapt(batch.inputs),)).softmax(1).detach()
                z = student(batch.inputs).logits
                optimizer.zero_grad()
                (F.cross_entropy(z, batch.labels) + (p * (p.log() - z.log_softmax(1))).sum(1).mean()).backward()
                optimizer.step()
    for key, value in weights(tmp_path / "runs" / "pupil").items():
        torch.testing.assert_close(student.module.state_dict()[key].cpu(), value, rtol=1e-4, atol=1e-6)
    told = [(line["stage"], line["epoch"]) for line in metrics(tmp_path / "runs" / "pupil") if line["kind"] == "epoch"]
    assert told == [("epoch_2", 1), ("epoch_4", 1), ("trained", 1), ("trained", 2)]


def test_a_loss_goes_on_with_what_it_learnt_but_looks_into_the_anchor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = [{"use": "srrl", "layers": [{"student": "penultimate", "teacher": "penultimate"}]}]
    kdkit.train(recipes(tmp_path, losses=losses, schedule={"anchors": [2], "epochs": 1}), quiet=True)
    made, checkpoints = tmp_path / "runs" / "taught", Checkpoints(tmp_path / "runs" / "pupil" / "checkpoints")
    for stage, file in (("stage0", made / "snapshots" / "train" / "epoch-0002.safetensors"), ("stage1", made / "student.safetensors")):
        learner = checkpoints.load_newest(stage)[0]["trainer"]["learner"]
        assert torch.equal(learner["objectives.0.losses.srrl.classifier.weight"], load_file(file)["fc.weight"])


def test_each_anchor_is_frozen_and_of_its_own(tmp_path):
    def stages():
        class Models:
            def student(self):
                return lambda inputs: kdkit.Outputs(torch.zeros(len(inputs), 5, requires_grad=True))

            def teacher(self, name=None, epoch=None):
                return lambda inputs: kdkit.Outputs(torch.full((len(inputs), 5), float(epoch or 99), requires_grad=True))

        return Rco(Rco.Options(anchors=(3, 7), epochs=5)).stages(Models())

    found = []
    for stage in stages():
        (lesson,) = stage.step(kdkit.Batch(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2)))
        (teacher,) = lesson.teachers
        assert lesson.student.logits.requires_grad and not teacher.logits.requires_grad
        found.append((stage.name, float(teacher.logits[0, 0]), stage.training.epochs))
    assert found == [("epoch_3", 3, 5), ("epoch_7", 7, 5), ("trained", 99, None)]


@pytest.mark.parametrize("anchors", [(), (3, 2), (2, 2), (0, 2)])
def test_anchors_that_are_no_route(anchors):
    with pytest.raises(ValueError, match="anchors"):
        Rco.Options(anchors=anchors)


@pytest.mark.parametrize(
    ("taught", "changes", "says"),
    [
        (
            {"run": {"snapshots": None}},
            {},
            "schedule: the run of teacher (teacher.yaml) keeps no snapshots; set `run.snapshots: N` in teacher.yaml",
        ),
        ({}, {"schedule": {"anchors": [3]}}, "schedule: the run of teacher (teacher.yaml) has no snapshot of epoch 3, only of 2, 4"),
        ({}, {"teacher": {"model": "mlp/16", "recipe": None}}, "schedule: teacher has no snapshots of its training"),
        ({}, {"schedule": {"anchors": [4, 2]}}, "schedule.anchors: must be epochs in ascending order"),
    ],
)
def test_a_route_that_is_not_kept_is_told_before_training(tmp_path, taught, changes, says):
    path = recipes(tmp_path, taught, **changes)
    if "teacher" in changes:
        path = write(tmp_path, {**PUPIL, "teacher": {"model": "mlp/16"}})
    with pytest.raises(kdkit.RecipeError) as caught:
        kdkit.check(path)
    assert says in str(caught.value) and "recipe.yaml:" in str(caught.value)


def test_a_teacher_that_was_trained_without_snapshots_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kdkit.train(write(tmp_path, TAUGHT, "teacher.yaml", run={"snapshots": None}), quiet=True)
    with pytest.raises(kdkit.RunError, match=r"the run of teacher \(teacher.yaml\) keeps no snapshots; .* train it again"):
        kdkit.train(recipes(tmp_path), quiet=True)
    assert not (tmp_path / "runs" / "pupil" / "result.json").exists()


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bits_and_can_be_evaluated(tmp_path):
    path = recipes(tmp_path, run={"checkpoint_steps": 3})
    assert Command(tmp_path, "train", path, "--run", "whole").finish()[0] == 0
    for wanted in (4, 11):
        command = Command(tmp_path, "train", path)
        if command.wait_for(lambda wanted=wanted: lines(tmp_path / "runs" / "pupil") >= wanted):
            command.process.kill()
            command.process.join()
    code, log = Command(tmp_path, "train", path).finish()
    assert code == 0, log
    assert_same_run(tmp_path / "runs" / "pupil", tmp_path / "whole")
    code, log = Command(tmp_path, "evaluate", "runs/pupil").finish()
    test = json.loads((tmp_path / "runs" / "pupil" / "result.json").read_text())["test"]
    assert code == 0 and f"{test['nll']:.4f}" in log


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    path = recipes(tmp_path)
    assert Command(tmp_path, "train", path, "--run", "one").finish()[0] == 0  # and the teacher, once
    commands = together(tmp_path, "train", path, "--run", "two")
    assert [command.finish()[0] for command in commands] == [0, 0], commands[0].log.read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
