"""Two processes give what one process gives with the whole batch.

Relation losses do with `gather: true`: without it they compare the images of a process's own share. test_gather.py has them all.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import PATIENCE, TINY, Command, lines, metrics, together, weights, write

NET = '''
from torch import nn


class Net(nn.Module):
    """Two convolutions without batch normalisation."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(x.mean((2, 3)))
'''
PAIRS = [{"student": "conv2", "teacher": "conv2"}]
RECIPE = {
    "name": "shared",
    "data": {
        "dataset": {"use": "synthetic", "image_size": 8, "train": 36, "test": 19, "num_classes": 6},
        "batch_size": 8,
        "drop_last": False,
    },
    "student": {"model": "python/Net", "file": "net.py", "args": {"width": 4}},
    "teacher": {"model": "python/Net", "file": "net.py", "args": {"width": 6}},
    "schedule": {"use": "offline"},
    "losses": [
        {"use": "cross_entropy"},
        {"use": "logit_kl"},
        {"use": "hint", "adapter": "linear", "layers": PAIRS},
        {"use": "at", "weight": 10, "layers": PAIRS},
    ],
    "train": {"epochs": 2, "optimizer": {"lr": 0.1}, "clip_grad": 1.0},
    "run": {"log_steps": 2},
}
FIRST_LAYER_ONLY = [{"use": "hint", "adapter": "linear", "layers": [{"student": "conv1", "teacher": "conv1"}]}]
GATHERED = [
    {"use": "cross_entropy"},
    {"use": "sp", "gather": True, "weight": 100, "layers": PAIRS},
    {"use": "irg", "gather": True, "layers": [{"student": "conv1", "teacher": "conv1"}, *PAIRS]},
]
TWICE = '''
import kdkit


class Twice(kdkit.Schedule):
    """One student in two stages, the first of which uses a part of it."""

    name = "twice"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        student = models.student()
        yield kdkit.Stage("hints", [student], kdkit.teach(student, by=[models.teacher()]), losses=["hint"], epochs=1)
        yield kdkit.Stage("answers", [student], kdkit.teach(student, by=[models.teacher()]))


@kdkit.hookimpl
def kdkit_schedules():
    return [Twice]
'''


def recipe(folder, **changes):
    (folder / "net.py").write_text(NET)
    (folder / "twice.py").write_text(TWICE)
    return write(folder, RECIPE, **changes)


def assert_alike(run, other):
    """Weights and metrics agree but for rounding."""
    ours, theirs = weights(run), weights(other)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert len(metrics(run)) == len(metrics(other))
    for one, two in zip(metrics(run), metrics(other), strict=True):
        for key in ("terms", "train", "test"):
            assert one.get(key, {}) == pytest.approx(two.get(key, {}), rel=1e-3, abs=1e-4)
    assert json.loads((run / "result.json").read_text())["test"] == pytest.approx(
        json.loads((other / "result.json").read_text())["test"], rel=1e-3
    )


@pytest.mark.first(2)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"accumulate": 2}},
        {"losses": FIRST_LAYER_ONLY},
        {"plugins": ["twice.py"], "schedule": {"use": "twice"}},
        {"losses": GATHERED, "train": {"epochs": 1}},
        {"losses": GATHERED, "train": {"accumulate": 2}},
        {"losses": GATHERED[1:2], "train": {"epochs": 1}},
    ],
    ids=[
        "all losses",
        "accumulated",
        "part of the student unused",
        "two stages",
        "relations",
        "relations, accumulated",
        "a relation alone, part of the student unused",
    ],
)
def test_two_processes_equal_one(tmp_path, changes):
    path = recipe(tmp_path, **changes)
    one = Command(tmp_path, "train", path, "--run", "one")
    two = together(tmp_path, "train", path, "--run", "two")
    for command in (one, *two):
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
    first, second = (command.log.read_text() for command in two)
    assert "epoch 1/" in first
    assert "epoch" not in second  # the other one is silent


def test_a_plateau_schedule_is_the_same_in_all_processes(tmp_path):
    path = recipe(tmp_path, train={"epochs": 4, "lr_schedule": {"name": "plateau", "patience": 0, "decay_rate": 0.5}})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0]
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(tmp_path):
    path = recipe(tmp_path, train={"epochs": 12, "evaluate_every": 6})
    whole = together(tmp_path, "train", path, "--run", "whole")
    assert [command.finish()[0] for command in whole] == [0, 0]
    stopped = together(tmp_path, "train", path, "--run", "run")
    assert stopped[0].wait_for(lambda: lines(tmp_path / "run") >= 8), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)  # one is enough
    assert [command.finish()[0] for command in stopped] == [143, 143]
    again = together(tmp_path, "train", path, "--run", "run")
    assert [command.finish()[0] for command in again] == [0, 0]
    assert "going on with stage 'distill'" in again[0].log.read_text()
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_alike(tmp_path / "run", tmp_path / "whole")  # means are put together from the processes' in another order


def test_batch_statistics_are_the_first_processs_when_measured(tmp_path):
    """Each process measures its share of the test data: with its own statistics, the parts would be of two networks."""
    recipe(tmp_path)
    path = write(tmp_path, {**RECIPE, "student": TINY, "losses": RECIPE["losses"][:2]})
    commands = together(tmp_path, "train", path, "--run", "two")
    assert [command.finish()[0] for command in commands] == [0, 0]
    code, log = Command(tmp_path, "evaluate", "two", "--plugins", "net.py").finish()
    assert code == 0, log
    test = json.loads((tmp_path / "two" / "result.json").read_text())["test"]
    assert re.search(rf"{test['nll']:.4f}\b", log), (test, log)


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on(tmp_path):
    path = recipe(tmp_path, train={"epochs": 200})
    run = tmp_path / "runs" / "shared"
    kdkit = shutil.which("kdkit", path=str(Path(sys.executable).parent))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", kdkit, "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launched = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + PATIENCE
    while lines(run) < 12:
        assert launched.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    log, _ = launched.communicate(timeout=PATIENCE)
    assert "stopped by SIGTERM" in log
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    whole = together(tmp_path, "train", path, "--run", "whole")
    assert [command.finish()[0] for command in whole] == [0, 0]
    ours, theirs = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
