"""Stages go on after any stop as if there had been none."""

import json
import random
import signal
import time

import pytest
import torch
from training import EVERYTHING, PLAIN, Command, assert_same_run, lines, metrics, train, write

import kdkit
from kdkit.runs.checkpoints import Checkpoints

BORN_TWICE = '''
import kdkit


class Twice(kdkit.Schedule):
    """A stage of hints, then one of answers, for the same student; then its own student."""

    name = "twice"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        student = models.student()
        yield kdkit.Stage("hints", [student], kdkit.teach(student, by=[models.teacher()]), losses=["hint"], epochs=1)
        yield kdkit.Stage("answers", [student], kdkit.teach(student, by=[models.teacher()]), losses=["cross_entropy", "logit_kl"])
        teacher, student = student.freeze(), models.student()
        yield kdkit.Stage("again", [student], kdkit.teach(student, by=[teacher]), losses=["cross_entropy", "logit_kl"], epochs=1)


@kdkit.hookimpl
def kdkit_schedules():
    return [Twice]
'''


def twice(folder):
    """A recipe of three stages."""
    (folder / "twice.py").write_text(BORN_TWICE)
    losses = [*PLAIN["losses"], {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}]
    return {
        **PLAIN,
        "name": "twice",
        "plugins": ["twice.py"],
        "schedule": {"use": "twice"},
        "losses": losses,
        "run": {"log_steps": 1, "checkpoint_steps": 4},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of EVERYTHING, made by the command."""
    folder = tmp_path_factory.mktemp("whole")
    code, log = Command(folder, "train", write(folder, EVERYTHING), "--run", "run").finish()
    assert code == 0, log
    return folder / "run"


def kill_often(folder, recipe, run, total_lines, kills, seed):
    """Carry out a recipe, killed at random moments, until it is done."""
    print(f"kill seed {seed}")
    dice, killed = random.Random(seed), 0
    for _ in range(kills):
        command = Command(folder, "train", recipe, "--run", run)
        if killed and dice.random() < 0.25:
            time.sleep(dice.uniform(0, 1.0))
        else:
            wanted = min(lines(folder / run) + dice.randint(1, max(2, total_lines // 3)), total_lines)
            command.wait_for(lambda wanted=wanted: lines(folder / run) >= wanted)
            time.sleep(dice.uniform(0, 0.05))
        if not command.process.is_alive():
            break
        command.send(signal.SIGKILL)
        command.process.join()
        killed += 1
    print(f"killed {killed} times")
    assert killed
    code, log = Command(folder, "train", recipe, "--run", run).finish()
    assert code == 0, log


def test_a_killed_stage_resumes_to_the_same_bits(tmp_path, whole):
    kill_often(tmp_path, write(tmp_path, EVERYTHING), "run", lines(whole), 3, time.time_ns())
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_stage_killed_many_times_resumes_to_the_same_bits(tmp_path, whole, seed):
    kill_often(tmp_path, write(tmp_path, EVERYTHING), "run", lines(whole), 12, seed)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_several_stages_resume_between_and_inside(tmp_path):
    recipe = write(tmp_path, twice(tmp_path))
    assert Command(tmp_path, "train", recipe, "--run", "whole").finish()[0] == 0
    kill_often(tmp_path, recipe, "run", lines(tmp_path / "whole"), 3, time.time_ns())
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert {line["stage"] for line in metrics(tmp_path / "run")} == {"hints", "answers", "again"}


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [
        (signal.SIGTERM, 143, False),
        *(pytest.param(*each, True, marks=pytest.mark.slow) for each in ((signal.SIGTERM, 143), (signal.SIGINT, 130))),
    ],
)
def test_a_signal_saves_and_says_how_to_resume(tmp_path, whole, number, code, group):
    recipe = write(tmp_path, EVERYTHING, run={"checkpoint_steps": None})
    command = Command(tmp_path, "train", recipe, "--run", "run")
    assert command.wait_for(lambda: lines(tmp_path / "run") >= 9), command.finish()
    command.send(number, group)
    found, log = command.finish()
    assert found == code
    assert f"stopped by {number.name} in epoch" in log
    assert "the same command goes on from here" in log
    assert "Traceback" not in log
    before = lines(tmp_path / "run")
    again, log = Command(tmp_path, "train", recipe, "--run", "run").finish()
    assert again == 0
    assert "going on with stage 'distill'" in log
    assert before > 0
    assert_same_run(tmp_path / "run", whole)


def interrupt_at(monkeypatch, step):
    """Let a signal come once so many steps are done."""
    from kdkit.engine import loop
    from kdkit.runs.interrupts import StopRequest

    requests = []
    enter, optimize = StopRequest.__enter__, loop.optimize

    def entered(self):
        requests.append(self)
        return enter(self)

    def optimized(trainer, group):
        values = optimize(trainer, group)
        if trainer.steps == step:
            requests[-1].signal = signal.SIGTERM
        return values

    monkeypatch.setattr(StopRequest, "__enter__", entered)
    monkeypatch.setattr(loop, "optimize", optimized)


def interrupted(folder, step, **changes):
    """A run of PLAIN (6 steps an epoch) stopped after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(kdkit.Interrupted):
            train(folder, **changes)
    return folder / "run"


def test_resume_passes_over_a_truncated_checkpoint(tmp_path):
    train(tmp_path, into="whole")
    run = interrupted(tmp_path, 9)
    newest = max((run / "checkpoints").glob("*.pt"))
    assert "-00000009-" in newest.name
    newest.write_bytes(newest.read_bytes()[:-100])
    (run / "checkpoints" / ".abc.part").write_bytes(b"half")
    result = train(tmp_path)
    assert any(newest.name in warning and "the one before it" in warning for warning in result.warnings)
    assert_same_run(run, tmp_path / "whole")
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_resume_without_an_intact_checkpoint_begins_the_stage_anew(tmp_path):
    train(tmp_path, into="whole")
    run = interrupted(tmp_path, 9)
    for file in (run / "checkpoints").glob("*.pt"):
        file.write_bytes(b"")
    result = train(tmp_path)
    assert any("begins anew" in warning for warning in result.warnings)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_resume_trains_a_lost_stage_again(tmp_path):
    recipe = write(tmp_path, twice(tmp_path))
    kdkit.train(recipe, folder=tmp_path / "whole", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 9)  # the second stage is the first that has so many
        with pytest.raises(kdkit.Interrupted, match="answers"):
            kdkit.train(recipe, folder=tmp_path / "run", quiet=True)
    Checkpoints(tmp_path / "run" / "checkpoints").discard("stage0")
    kdkit.train(recipe, folder=tmp_path / "run", quiet=True)
    key = lambda line: (line["stage"], line["step"], line["kind"])  # noqa: E731
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line) for line in sorted(metrics(tmp_path / "run"), key=key)) + "\n"
    )
    (tmp_path / "whole" / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line) for line in sorted(metrics(tmp_path / "whole"), key=key)) + "\n"
    )
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_resume_leaves_out_a_half_written_line_of_metrics(tmp_path):
    train(tmp_path, into="whole")
    run = interrupted(tmp_path, 9)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "stage": "distill", "ep')
    train(tmp_path)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_plateau_schedule_resumes_with_its_counts(tmp_path):
    plateau = {"epochs": 5, "lr_schedule": {"name": "plateau", "patience": 1, "decay_rate": 0.5}}
    train(tmp_path, into="whole", train=plateau)
    run = interrupted(tmp_path, 21, train=plateau)
    train(tmp_path, train=plateau)
    assert_same_run(run, tmp_path / "whole")


def test_a_checkpoint_of_something_else_is_one_line(tmp_path):
    run = interrupted(tmp_path, 3)
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save("stage0", 99, {"trainer": {"epoch": 0, "step": 1, "learner": {"a": torch.zeros(1)}}})
    with pytest.raises(kdkit.RunError, match="another version of kdkit or of a plugin"):
        train(tmp_path)


def test_warnings_survive_a_resume(tmp_path):
    silent = {"losses": [*PLAIN["losses"], {"use": "logit_mse", "name": "mse"}]}
    with pytest.MonkeyPatch.context() as patch:
        from kdkit.engine.trainer import Learner

        forward = Learner.forward

        def silenced(self, batch, moment, ramps):
            total, values = forward(self, batch, moment, ramps)
            if moment.epoch < 1:
                values[0].terms["mse"].zero_()
            return total, values

        patch.setattr(Learner, "forward", silenced)
        interrupted(tmp_path, 9, **silent)
        result = train(tmp_path, **silent)
    zero = "mse was exactly 0 in all of epoch 1 of stage 'distill': nothing is learnt from it"
    assert [warning for warning in result.warnings if "guessing" not in warning] == [zero]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["warnings"] == list(result.warnings)
