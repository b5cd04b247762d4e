"""A device may be named, and one that the machine lacks is refused in one line."""

import pytest
import torch

from kdkit import recipe
from kdkit.engine.accelerator import build_accelerator
from kdkit.errors import RunError
from kdkit.models import devices

RECIPE = """\
name: somewhere
data: {dataset: {use: digits}}
student: {model: mlp/4}
schedule: {use: supervised}
losses: [{use: cross_entropy}]
train: {epochs: 1, optimizer: {lr: 0.1}, device: %s}
"""


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: ["cpu", "cuda:0", "cuda:1"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def section(tmp_path, device):
    (tmp_path / "r.yaml").write_text(RECIPE % device)
    return recipe.load(tmp_path / "r.yaml").spec.train


@pytest.mark.parametrize(("name", "device"), [("auto", None), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_a_device_of_the_machine_is_taken(two_gpus, name, device):
    assert devices.chosen(name) == (device and torch.device(device))


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta"])
def test_a_missing_device_is_refused_with_those_there_are(two_gpus, name):
    with pytest.raises(RunError, match=rf"this machine has no '{name}'; it has cpu, cuda:0, cuda:1"):
        devices.chosen(name)


def test_the_number_of_a_device_reaches_accelerate(two_gpus, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    assert build_accelerator(section(tmp_path, "cuda:1")).device == torch.device("cuda:1")
    assert build_accelerator(section(tmp_path, "cpu")).device == torch.device("cpu")


def test_one_device_is_not_for_several_processes(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="each of the 2 processes takes its own: say 'cuda'"):
        devices.chosen("cuda:1")
    assert devices.chosen("cuda") == torch.device("cuda")


def test_a_finished_run_may_be_read_where_its_device_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: ["cpu"])
    assert devices.for_reading(section(tmp_path, "cuda:1")).device == "auto"
    assert devices.for_reading(section(tmp_path, "cpu")).device == "cpu"
