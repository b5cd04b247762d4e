"""`kdkit doctor`: what it tells of this machine, and one line for each problem."""

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import kdkit
from kdkit import cli
from kdkit.engine import accelerator
from kdkit.models import devices
from kdkit.start import doctor


@pytest.fixture
def sound(monkeypatch):
    """A machine without a problem, whatever this one is."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(doctor, "_open_files", lambda: 4096)
    monkeypatch.setattr(doctor.NVIDIA.__class__, "exists", lambda path: path != doctor.NVIDIA)
    monkeypatch.setattr(accelerator, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def test_the_table_has_versions_devices_and_limits(sound, tmp_path):
    found = doctor.examine(tmp_path)
    rows = dict(found.rows)
    assert rows["kdkit"] == kdkit.__version__ and rows["torch"] == metadata.version("torch")
    assert {"device cpu", "processor", "extra export", "disk of runs", "disk of Hugging Face's files", "open files"} <= set(rows)
    assert "extra dev" not in rows and (found.notes, found.problems) == ([], [])


def test_what_is_known_of_a_processor_is_noted(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(accelerator, "multiplies_bf16", lambda: False)
    first, second = doctor.examine(tmp_path).notes
    assert "AVX512" in first and f"fewer than {devices.LEAST_CHANNELS} input channels" in first
    assert "bf16" in second


def disk(free):
    return lambda patch: patch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def without(name):
    def missing(patch):
        patch.setattr(doctor, "_version", lambda wanted: None if wanted == name else metadata.version(wanted))

    return missing


def broken(patch):
    def refuse(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    patch.setattr(doctor.importlib, "import_module", refuse)


def unreached(patch):
    patch.setattr(doctor.NVIDIA.__class__, "exists", lambda path: True)
    patch.setattr(devices, "present", lambda: ["cpu"])


PROBLEMS = {  # what is wrong: a part of the line
    "disk": (disk(10**8), "100 MB free for runs; a run may need more than 2 GB"),
    "shared memory": (disk(10**8), "/dev/shm: 100 MB free; workers that load images may be killed"),
    "open files": (lambda patch: patch.setattr(doctor, "_open_files", lambda: 256), "only 256 files may be open"),
    "old library": (lambda patch: patch.setattr(doctor, "_version", lambda _: "0.0.1"), "timm: 0.0.1; kdkit needs >=1.0.31"),
    "missing library": (without("psutil"), "psutil: is missing; kdkit needs"),
    "broken library": (broken, "torch: cannot be imported (RuntimeError: operator torchvision::nms"),
    "unreached GPU": (unreached, "an NVIDIA GPU is here, and torch"),
}


@pytest.mark.parametrize("wrong", PROBLEMS)
def test_a_problem_is_one_line_with_a_way_out(sound, tmp_path, monkeypatch, wrong):
    apply, says = PROBLEMS[wrong]
    apply(monkeypatch)
    problems = doctor.examine(tmp_path).problems
    assert [line for line in problems if says in line], problems
    assert not any("\n" in line for line in problems)


def test_a_missing_extra_is_no_problem(sound, tmp_path, monkeypatch):
    without("onnx")(monkeypatch)
    found = doctor.examine(tmp_path)
    assert dict(found.rows)["extra export"] == "without onnx: pip install 'kdkit[export]'"
    assert found.problems == []


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["the disk is full"], 1)])
def test_the_command_ends_with_a_code(monkeypatch, capsys, problems, code):
    found = doctor.Findings([doctor.Row("kdkit", "0")], ["slow"], problems)
    monkeypatch.setattr(doctor, "examine", lambda folder: found)
    monkeypatch.setattr(sys, "argv", ["kdkit", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code or 0) == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == ("problem: the disk is full" if problems else "no problem found")
    assert "note: slow" in printed
