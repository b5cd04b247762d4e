"""Every schedule, killed at random moments, ends with the weights of a run that never was."""

import random
import signal

import pytest
from test_every_pair import BASE, PLUGINS, SCHEDULES, WIDER
from training import Command, assert_same_run, lines, train, write

ALL = {
    **BASE,
    "data": {**BASE["data"], "dataset": {**BASE["data"]["dataset"], "train": 48}, "augment": {"crop_padding": 1, "flip": 0.5}},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}, {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}],
    "train": {"epochs": 2, "optimizer": {"lr": 0.02}},
    "run": {"log_steps": 1, "checkpoint_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", PLUGINS.schedules)
def test_killed_at_random_moments(schedule, tmp_path):
    taught = {**ALL, "name": "teacher", "student": WIDER, "schedule": {"use": "supervised"}, "losses": ALL["losses"][:1]}
    train(tmp_path, {**taught, "run": {"snapshots": 1}}, into="runs/teacher")
    (tmp_path / "recipe.yaml").rename(tmp_path / "teacher.yaml")
    spec = {**ALL, "schedule": {"use": schedule, **SCHEDULES.get(schedule, {})}}
    if PLUGINS.schedules[schedule].needs_teacher:
        spec["teacher"] = {"recipe": "teacher.yaml"}
    if schedule == "supervised":
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
