"""Every schedule, killed at random moments, ends with the weights of a run that never was."""

import random
import signal
import time

import pytest
import torch
from test_every_loss_and_schedule import BASE, FOR_ANY_NETWORK, PLUGINS, SCHEDULES, WIDER
from training import Command, assert_same_run, lines, metrics, start, train, weights, write

ALL = {
    **BASE,
    "data": {**BASE["data"], "dataset": {**BASE["data"]["dataset"], "train": 48}, "augment": {"crop_padding": 1, "flip": 0.5}},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}],
    "train": {"epochs": 2, "optimizer": {"lr": 0.02}},
    "run": {"log_steps": 1, "checkpoint_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", FOR_ANY_NETWORK)
def test_a_schedule_killed_at_random_moments_resumes(schedule, tmp_path):
    taught = {**ALL, "name": "teacher", "student": WIDER, "schedule": {"use": "supervised"}, "losses": ALL["losses"][:1]}
    train(tmp_path, {**taught, "run": {"snapshots": 1}}, into="runs/teacher")
    (tmp_path / "recipe.yaml").rename(tmp_path / "teacher.yaml")
    spec = {**ALL, "schedule": {"use": schedule, **SCHEDULES.get(schedule, {})}}
    if PLUGINS.schedules[schedule].needs_teacher:
        spec["teacher"] = {"recipe": "teacher.yaml"}
    if not PLUGINS.schedules[schedule].needs_images:
        data = {key: value for key, value in ALL["data"].items() if key != "augment"}
        spec |= {"data": {**data, "synthetic_batches": 6}, "losses": ALL["losses"][1:]}
    if PLUGINS.schedules[schedule].scheme == "none":
        spec["losses"] = ALL["losses"][:1]
    path = write(tmp_path, spec)
    code, log = Command(tmp_path, "train", path, "--run", "whole").finish()
    assert code == 0, log
    dice, total = random.Random(), lines(tmp_path / "whole")
    for share in sorted(dice.random() for _ in range(3)):
        command = Command(tmp_path, "train", path, "--run", "parts")
        if command.wait_for(lambda share=share: lines(tmp_path / "parts") >= share * total):
            command.send(signal.SIGKILL)
        command.process.join()
    code, log = Command(tmp_path, "train", path, "--run", "parts").finish()
    assert code == 0, log
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


SLOWER = {
    **ALL,
    "name": "taught",
    "teacher": {"recipe": "teacher.yaml"},
    "schedule": {"use": "offline"},
    "train": {"epochs": 4, "optimizer": {"lr": 0.02}},
}
STUDY = """
name: study
base: taught.yaml
baseline: alone
variants: {alone: {teacher: null, schedule: {use: supervised}, losses: [{use: cross_entropy}]}, taught: {}}
seeds: 2
"""
KILLS = 10
WORDS = {"train": ["train", "taught.yaml"], "compare": ["compare", "study.yaml"]}


def home(folder):
    folder.mkdir()
    write(
        folder, {**ALL, "name": "teacher", "student": WIDER, "schedule": {"use": "supervised"}, "losses": ALL["losses"][:1]}, "teacher.yaml"
    )
    write(folder, SLOWER, "taught.yaml")
    (folder / "study.yaml").write_text(STUDY)
    return folder


def told(folder):
    """Lines of metrics of all runs in a folder."""
    return sum(lines(file.parent) for file in folder.rglob("metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "processes"), [("train", 1), ("compare", 1), ("train", 2), ("compare", 2)])
def test_a_killed_schedule_resumes_to_the_same_bits(command, processes, tmp_path):
    """Kills at random moments, from the start of the process to its end: none leaves a traceback, none is lost without a word."""
    dice, tried, tracebacks, silent = random.Random(), 0, 0, 0

    def begin(folder):
        return start(folder, [WORDS[command]] * processes) if processes > 1 else [Command(folder, *WORDS[command])]

    whole = home(tmp_path / "whole")
    assert [one.finish()[0] for one in begin(whole)] == [0] * processes
    total, number = told(whole), 0
    while tried < KILLS:
        number += 1
        parts = home(tmp_path / f"parts{number}")
        for share in sorted(dice.random() for _ in range(4)):
            going = begin(parts)
            victim = dice.choice(going)
            if victim.wait_for(lambda share=share, parts=parts: told(parts) >= share * total):
                time.sleep(dice.random() / 20)
                tried += victim.process.is_alive()
                victim.send(signal.SIGKILL)
            for one in going:
                code, log = one.finish()
                tracebacks += "Traceback" in log
                silent += one is not victim and code != 0 and not log.strip()
        ended = [one.finish() for one in begin(parts)]
        assert [code for code, _ in ended] == [0] * processes, ended
        for run in [file.parent for file in whole.rglob("result.json")]:
            again = parts / run.relative_to(whole)
            if processes == 1:
                assert_same_run(run, again)
                continue
            ours, theirs = weights(again), weights(run)  # means over processes are put together in another order: their last digits differ
            assert len(metrics(again)) == len(metrics(run)) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    print(command, processes, {"tried": tried, "rounds": number, "tracebacks": tracebacks, "silent": silent})
    assert (tracebacks, silent) == (0, 0)
