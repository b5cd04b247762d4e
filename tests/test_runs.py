"""Runs: whose folder, whose teacher, what ends them."""

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from training import PLAIN, TINY, Command, assert_same_run, lines, merged, metrics, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.contracts.dataset_source import DataInfo
from kdkit.engine import setup
from kdkit.engine.accelerator import build_accelerator
from kdkit.runs import opening, training
from kdkit.runs.checkpoints import Checkpoints
from kdkit.runs.folder import RunFolder

INFO = DataInfo((1, 8, 8), num_classes=10, num_train=1000, num_test=797)

TEACHER = {**PLAIN, "name": "taught", "schedule": {"use": "supervised"}, "teacher": None, "losses": [{"use": "cross_entropy"}]}
PUPIL = {**PLAIN, "name": "pupil", "teacher": {"recipe": "teacher.yaml"}}
LOSS = '''
import torch
import kdkit


class Odd(kdkit.Loss):
    """The mean logit, until call number 7 (of training steps)."""

    name = "odd"
    knowledge = "labels"
    calls = 0

    def setup(self, student, teacher, context=None):
        self.calls = 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        return {then}


@kdkit.hookimpl
def kdkit_losses():
    return [Odd]
'''
TAMPERING = '''
import torch
import kdkit


class Tampering(kdkit.Schedule):
    """Changes its teacher."""

    name = "tampering"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        student, teacher = models.student(), models.teacher()
        done = []

        def tamper():
            done.append(1)
            if len(done) == 3:
                with torch.no_grad():
                    {how}

        yield kdkit.Stage("distill", [student], kdkit.teach(student, by=[teacher]), after_step=tamper)


@kdkit.hookimpl
def kdkit_schedules():
    return [Tampering]
'''
MUTUAL = '''
import torch
import kdkit


class Pair(kdkit.Schedule):
    """Two peers teach each other."""

    name = "pair"
    scheme = "online"
    needs_teacher = False

    def stages(self, models):
        peers = [models.student(), models.student()]

        def step(batch):
            answers = [peer(batch.inputs) for peer in peers]
            return [kdkit.Lesson(answers[0], [answers[1].detach()]), kdkit.Lesson(answers[1], [answers[0].detach()])]

        yield kdkit.Stage("peers", peers, step)


@kdkit.hookimpl
def kdkit_schedules():
    return [Pair]
'''


def files(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    first = train(tmp_path)
    before = files(tmp_path)
    assert train(tmp_path) == first
    assert files(tmp_path) == before


def test_a_run_whose_student_was_taken_away_makes_it_again(tmp_path):
    train(tmp_path)
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").unlink()
    train(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


def test_the_folder_of_another_recipe_is_refused_unchanged(tmp_path):
    train(tmp_path)
    before = files(tmp_path / "run")
    with pytest.raises(kdkit.RunError, match=r"another recipe \(different: seed, train.optimizer.lr\)"):
        train(tmp_path, seed=1, train={"optimizer": {"lr": 0.1}})
    code, log = Command(tmp_path, "train", tmp_path / "recipe.yaml", "--run", "run").finish()
    assert (code, "--restart" in log, "Traceback" in log) == (2, True, False)
    assert files(tmp_path / "run") == before


def test_restart_throws_the_old_run_away(tmp_path):
    train(tmp_path)
    train(tmp_path, into="whole", seed=1)
    (tmp_path / "run" / "best.safetensors").write_bytes(b"old")
    train(tmp_path, seed=1, restart=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path, restart):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    with pytest.raises(kdkit.RunError, match="is not a run folder"):
        train(tmp_path, restart=restart)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_leftovers_of_a_killed_process_in_a_new_folder_are_ignored(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".abc.part"):
        (tmp_path / "run" / name).touch()
    train(tmp_path)
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    path = write(tmp_path)
    loaded = recipe.load(path)
    with RunFolder(tmp_path / "run").claimed(loaded, INFO):
        before = files(tmp_path / "run")
        for restart in ([], ["--restart"]):
            code, log = Command(tmp_path, "train", path, "--run", "run", *restart).finish()
            assert code == 2
            assert "another process is training in this folder" in log
        assert files(tmp_path / "run") == before
    train(tmp_path)


def test_a_recipe_as_teacher_is_trained_once_and_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, TEACHER, "teacher.yaml")
    kdkit.train(write(tmp_path, PUPIL), quiet=True)
    made = tmp_path / "runs" / "taught"
    before = files(made)
    result = kdkit.train(write(tmp_path, PUPIL, seed=1, name="pupil.yaml"), folder="second", quiet=True)
    assert files(made) == before
    theirs = json.loads((made / "result.json").read_text())["test"]
    assert result.teacher["top1"] == theirs["top1"]

    write(tmp_path, TEACHER, "teacher.yaml", seed=5)
    kdkit.train(write(tmp_path, PUPIL), folder="third", quiet=True)
    assert files(made) == before
    others = [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith("taught-")]
    assert len(others) == 1


def test_a_teacher_named_as_its_pupil_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, merged(TEACHER, {"name": "same"}), "teacher.yaml")
    result = kdkit.train(write(tmp_path, merged(PUPIL, {"name": "same"})), quiet=True)
    assert result.folder == Path("runs/same")
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_run_killed_while_its_teacher_trains_resumes_there(tmp_path):
    long = merged(TEACHER, {"train": {"epochs": 3}, "run": {"checkpoint_steps": 2}})
    write(tmp_path, long, "teacher.yaml")
    path = write(tmp_path, PUPIL)
    command = Command(tmp_path, "train", path)
    assert command.wait_for(lambda: lines(tmp_path / "runs" / "taught") >= 8), command.finish()
    command.process.kill()
    command.process.join()
    code, log = Command(tmp_path, "train", path).finish()
    assert code == 0
    assert "going on with stage 'train'" in log
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", long, "teacher.yaml")
    assert Command(tmp_path / "whole", "train", write(tmp_path / "whole", PUPIL)).finish()[0] == 0
    for name in ("taught", "pupil"):
        assert_same_run(tmp_path / "runs" / name, tmp_path / "whole" / "runs" / name)


def odd(folder, then):
    (folder / "odd.py").write_text(LOSS.replace("{then}", then))
    return {"plugins": ["odd.py"], "losses": [*PLAIN["losses"], {"use": "odd", "weight": 0.1}], "run": {"log_steps": 50}}


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path, number):
    changes = odd(tmp_path, f"student.logits.mean() * (float('{number}') if self.calls == 7 else 1)")  # 6 steps an epoch
    with pytest.raises(
        kdkit.RunError, match=rf"stage 'distill', step 7: odd is -?{number}; a smaller train.optimizer.lr, .*; the last good checkpoint"
    ) as told:
        train(tmp_path, **changes)
    assert "checkpoints" in str(told.value)
    assert not (tmp_path / "run" / "result.json").exists()
    state, broken = Checkpoints(tmp_path / "run" / "checkpoints").load_newest("stage0")
    assert state["trainer"]["epoch"] == 1 and not broken
    assert all(value.isfinite().all() for value in state["trainer"]["learner"].values())


def test_a_gradient_that_is_not_finite_in_the_last_step_leaves_no_checkpoint(tmp_path):
    changes = odd(tmp_path, "(student.logits.mean() * (0 if self.calls == 12 else 1)).abs().sqrt()")  # infinite slope at 0
    with pytest.raises(kdkit.RunError, match="step 12: the losses are finite, but after the optimizer's step students.0.+ is not"):
        train(tmp_path, **changes)
    state, _ = Checkpoints(tmp_path / "run" / "checkpoints").load_newest("stage0")
    assert state["trainer"]["epoch"] == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_term_that_is_always_zero_is_told(tmp_path):
    result = train(tmp_path, **odd(tmp_path, "student.logits.mean() * 0"))
    expected = [f"odd was exactly 0 in all of epoch {epoch} of stage 'distill': nothing is learnt from it" for epoch in (1, 2)]
    assert [warning for warning in result.warnings if "guessing" not in warning] == expected
    assert json.loads((tmp_path / "run" / "result.json").read_text())["warnings"] == list(result.warnings)


def teacher_of(patch):
    """Collects every factory's teacher."""
    from kdkit.runs.networks import ModelFactory

    found = []
    teacher = ModelFactory.teacher

    def taken(self, name=None):
        model = teacher(self, name)
        found.append((model, {n: v.clone() for n, v in [*model.module.named_parameters(), *model.module.named_buffers()]}))
        return model

    patch.setattr(ModelFactory, "teacher", taken)
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_frozen_teacher_is_the_same_bits_after_a_run(tmp_path, monkeypatch, mode):
    found = teacher_of(monkeypatch)
    train(tmp_path, teacher={"mode": mode})
    model, before = next((model, before) for model, before in found if next(model.module.parameters()).device.type != "meta")
    after = {n: v for n, v in [*model.module.named_parameters(), *model.module.named_buffers()]}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.module.training is False
    assert {part.training for part in model.module.modules() if isinstance(part, torch.nn.BatchNorm2d)} == {mode == "train"}


@pytest.mark.parametrize("how", ["next(teacher.module.parameters()).add_(1e-3)", "next(teacher.module.buffers()).add_(1e-3)"])
def test_a_changed_teacher_ends_the_run_without_result_and_for_good(tmp_path, how):
    (tmp_path / "tampering.py").write_text(TAMPERING.replace("{how}", how))
    for _ in range(2):  # nor is it finished by asking again
        with pytest.raises(kdkit.RunError, match="teacher.* is frozen, yet its parameters or buffers have changed"):
            train(tmp_path, plugins=["tampering.py"], schedule={"use": "tampering"})
        assert not (tmp_path / "run" / "result.json").exists()
        assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_peers_have_scores_of_their_own(tmp_path):
    (tmp_path / "pair.py").write_text(MUTUAL)
    result = train(tmp_path, plugins=["pair.py"], schedule={"use": "pair"}, teacher=None)
    last = metrics(tmp_path / "run")[-1]
    terms = {f"{name}@{i}{end}" for name in ("cross_entropy", "logit_kl") for i in (1, 2) for end in ("", ".weighted")}
    assert last["train"].keys() == {"loss", *terms}
    assert last["train"]["loss"] == pytest.approx(
        sum(value for name, value in last["train"].items() if name.endswith(".weighted")), rel=1e-5
    )
    assert len(result.peers) == 1
    assert last["peers"][0]["test"] == result.peers[0] != result.test


def test_stages_that_cannot_be_told_apart_or_learn_nothing_are_refused(tmp_path):
    (tmp_path / "pair.py").write_text(
        MUTUAL.replace('yield kdkit.Stage("peers", peers, step)', "yield from [kdkit.Stage('peers', peers, step)] * 2")
    )
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: schedule: two stages are called 'peers'"):
        train(tmp_path, plugins=["pair.py"], schedule={"use": "pair"}, teacher=None)
    with pytest.raises(
        kdkit.RecipeError, match=r"recipe.yaml:\d+: losses: stage 'train' has no teacher, and none of its losses is on labels"
    ):
        train(tmp_path, schedule={"use": "supervised"}, teacher=None, losses=[{"use": "logit_kl"}])


def test_labels_are_found_by_the_index_of_a_batch(tmp_path):
    loaded = recipe.load(write(tmp_path, data={"train_samples": 24, "validation": 12}))
    prepared = opening.open_data(loaded, build_accelerator(loaded.spec.train))
    labels = setup._labels_by_index(prepared.train, loaded.task)
    for batch in prepared.train.epoch(0):
        assert torch.equal(labels[batch.index.cpu()], batch.labels.cpu())
    assert int((labels >= 0).sum()) == 24


def test_bf16_on_a_slow_processor_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "multiplies_bf16", lambda: False)
    result = train(tmp_path, train={"precision": "bf16", "epochs": 1, "device": "cpu"})
    assert [warning for warning in result.warnings if "bf16" in warning] == [
        "train.precision bf16 is slower than fp32 on this processor, which has no AMX"
    ]


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, protocol):
    """Even where the file's name carries the right digest."""
    import hashlib

    sign, evil = tmp_path / "sign", tmp_path / "evil.pt"
    if protocol == "torch":
        torch.save({"trainer": Malice(sign)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Malice(sign)))
    content = evil.read_bytes()
    train(tmp_path, into="whole")
    loaded = recipe.load(write(tmp_path))
    with RunFolder(tmp_path / "run").claimed(loaded, INFO):
        checkpoints = tmp_path / "run" / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / f"stage0-00000099-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
    result = train(tmp_path)
    assert not sign.exists()
    assert any("begins anew" in warning for warning in result.warnings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_takes_no_more_than_its_time_in_the_result(tmp_path):
    began = time.monotonic()
    result = train(tmp_path)
    assert 0 < result.seconds <= time.monotonic() - began
    assert result.parameters == sum(
        value.numel() for name, value in weights(tmp_path / "run").items() if "running" not in name and "num_b" not in name
    )
    assert TINY["model"] in (tmp_path / "run" / "recipe.yaml").read_text()
