"""Small recipes, and `kdkit` commands in processes of their own, forked from one that has imported everything."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdkit
from kdkit.recipe import registry

PATIENCE = 3000
"""Seconds that a test waits for another process: what takes longer on any machine hangs."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["preloaded"])
"""Make them with `forked`: whoever starts the first one decides what all are forked from."""
TIMES = ("seconds", "images_per_second", "crc")  # what differs between two runs of one recipe, and the check sum of it

TINY = {"model": "resnet18", "stem": "small", "args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "zero_init_last": False}}
PLAIN = {
    "name": "plain",
    "data": {"dataset": {"use": "synthetic", "image_size": 8, "train": 48, "test": 20, "num_classes": 6}, "batch_size": 8},
    "student": TINY,
    "teacher": {**TINY, "args": {**TINY["args"], "channels": [8, 8, 8, 16]}},
    "schedule": {"use": "offline"},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}],
    "train": {"epochs": 2, "optimizer": {"lr": 0.05}},
    "run": {"log_steps": 1},
}
EVERYTHING = {
    **PLAIN,
    "name": "everything",
    "data": {
        **PLAIN["data"],
        "dataset": {"use": "synthetic", "image_size": 8, "train": 104, "test": 20, "num_classes": 6},
        "timm_augment": {"auto_augment": None},
        "validation": 16,
        "workers": 2,
    },
    "losses": [
        {"use": "cross_entropy", "weight": {"from": 0.1, "to": 1, "epochs": 2}},
        {"use": "logit_kl", "temperature": {"from": 1, "to": 4, "epochs": 3, "shape": "cosine"}},
        {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]},
    ],
    "train": {
        "epochs": 3,
        "optimizer": {"lr": 0.05, "weight_decay": 0.001},
        "accumulate": 2,
        "ema": {"decay": 0.8},
        "mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "off_epoch": 2},
        "clip_grad": 1.0,
    },
    "run": {"log_steps": 1, "checkpoint_steps": 2},
}


def task(name="classification"):
    """A standard task."""
    return registry.load().tasks[name]()


def merged(base, changes):
    """Mappings merge, all else replaces."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def write(folder, recipe=PLAIN, name="recipe.yaml", **changes):
    """A recipe file in the folder."""
    path = Path(folder) / name
    path.write_text(yaml.safe_dump(merged(recipe, changes), sort_keys=False))
    return path


def train(folder, recipe=PLAIN, into="run", restart=False, **changes):
    """Carry the recipe out in this process; its result."""
    return kdkit.train(write(folder, recipe, **changes), folder=Path(folder) / into, restart=restart, quiet=True)


def forked(target, *given):
    """A process that calls the function, forked from one that has imported `preloaded`, which lies beside this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return PROCESSES.Process(target=target, args=given)


class Command:
    """A `kdkit` command, running in `folder`, with some environment variables beside what there is."""

    def __init__(self, folder, *arguments, **environment):
        self.log = Path(folder) / f"log-{time.monotonic_ns()}"
        self.log.touch()  # it may be killed before it writes
        self.process = forked(_run, str(folder), str(self.log), [str(a) for a in arguments], environment)
        self.process.start()

    def finish(self):
        """Its exit code and what it printed."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running: {self.log.read_text()}"
        return self.process.exitcode, self.log.read_text()

    def send(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait_for(self, condition):
        """Wait until something holds; whether the process still runs then."""
        until = time.monotonic() + PATIENCE
        while self.process.is_alive() and not condition():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.002)
        return self.process.is_alive()


def needs_a_device_each(processes):
    """Skip a test where processes would share a GPU."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} processes need a GPU each, or a machine without any")


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(folder, *arguments):
    """A command in two processes, as a launcher would start them."""
    return start(folder, [arguments, arguments])


def start(folder, commands):
    """Processes of one launch, each with the arguments that it gets."""
    needs_a_device_each(len(commands))
    shared = {
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    return [Command(folder, *words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank, words in enumerate(commands)]


def _run(folder, log, arguments, environment):
    os.setsid()
    os.environ.update(environment)
    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for target in (1, 2):
        os.dup2(stream, target)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # of its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that forks ignores it
    torch.set_num_threads(1)
    sys.argv = ["kdkit", *arguments]
    from kdkit.cli import main

    main()


def lines(run):
    """How many whole lines metrics.jsonl has."""
    file = Path(run) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def metrics(run):
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def weights(run, file="student.safetensors"):
    return load_file(Path(run) / file)


def assert_same_run(run, other):
    """Two run folders hold the same weights, bit for bit, and tell the same, times aside."""
    for file in ("student.safetensors", "best.safetensors"):
        assert (run / file).exists() == (other / file).exists()
        if (run / file).exists():
            ours, theirs = weights(run, file), weights(other, file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), file
    assert metrics(run) == metrics(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, other)]
    for result in results:
        del result["seconds"], result["cpu_seconds"], result["warnings"], result["sha256"], result["files"]
    assert results[0] == results[1]


def stop_and_go_on(path, folder, monkeypatch, steps=4):
    """Train a recipe, stopped after some steps, and go on."""
    from kdkit.runs.stage import StageRun

    after, taken = StageRun.after_step, []

    def stops(self, values):
        after(self, values)
        taken.append(1)
        if len(taken) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageRun, "after_step", stops)
        kdkit.train(path, folder=folder, quiet=True)
    kdkit.train(path, folder=folder, quiet=True)
