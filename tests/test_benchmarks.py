import re
import runpy
from pathlib import Path

import pytest

from kdkit.contracts.task import serves
from kdkit.recipe import registry

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOSSES = runpy.run_path(str(BENCHMARKS / "losses.py"))


@pytest.mark.slow
def test_every_loss_is_timed(capsys):
    LOSSES["main"](["--size", "small", "--steps", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    plugins = registry.load()
    served = {name for name, cls in plugins.losses.items() if serves(cls.for_tasks(), plugins.tasks["classification"]())}
    assert {row[0] for row in rows[1:]} == served
    compared = {row[0]: row[-1] for row in rows if row[-1].endswith("x")}
    assert set(LOSSES["NAIVE"]) == set(compared)
    assert float(compared["crd"][:-1]) > 10  # its memory


def test_a_naive_form_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setitem(LOSSES["NAIVE"], "nst", lambda loss, student, teacher, batch: 0 * student.features["late"].sum())
    with pytest.raises(AssertionError, match="nst's naive form gives another value"):
        LOSSES["main"](["--size", "small", "--steps", "1", "--losses", "nst"])


TINY = {
    "balances": ["--batch-size=4", "--image-size=8", "--rounds=1", "--teacher=cifar/resnet8", "--student=cifar/resnet8"],
    "cache": ["--images=16", "--image-size=8", "--batch-size=8", "--rounds=1"],
    "epoch": ["--pairs=resnet56-resnet20", "--images=64", "--workers=0", "--rounds=1"],
    "loader": ["--images=32", "--batch-size=16", "--rounds=1"],
    "segmentation": ["--images=4", "--batch-size=2", "--workers=0", "--rounds=1", "--steps=1"],
    "study": ["--only=time", "--runs=2", "--images=16", "--epochs=1", "--batch-size=8", "--image-size=8", "--steps=1", "--rounds=1"],
    "teacher": ["--batch-size=2", "--tap-size=32", "--image-size=8", "--rounds=1"],
}
FIGURES = {"balances": 42, "cache": 34, "epoch": 15, "loader": 12, "segmentation": 8, "study": 8, "teacher": 28}  # at least, in the table


SERVED = ["--pairs=resnet56, resnet20", "--steps=2", "--batch-size=2", "--image-size=8", "--rounds=1"]


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs one; the numbers of its tables, and what it printed."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name, *words):
        runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"](list(words))
        said = capsys.readouterr().out
        tables = "\n".join(line for line in said.splitlines() if "thread(s) of torch" not in line)
        return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)", tables)], said

    return run


@pytest.mark.parametrize("name", [name if name in ("loader", "teacher") else pytest.param(name, marks=pytest.mark.slow) for name in TINY])
def test_a_benchmark_has_figures(benchmark, name):
    if name == "segmentation":
        pytest.importorskip("segmentation_models_pytorch")
    numbers, said = benchmark(name, *TINY[name])
    assert len(numbers) >= FIGURES[name] and all(number > 0 for number in numbers), said
    assert "nan" not in said and "load of the machine" in said


@pytest.mark.slow
def test_images_of_a_study_are_read_once(benchmark):
    _, said = benchmark("study", "--only=files", "--images=64", "--epochs=2", "--batch-size=8", "--image-size=16", "--rounds=1")
    alone, together = (int(number.replace(",", "")) for number in re.findall(r"(?:one by one|side by side) ([\d,]+)", said)[-2:])
    assert together >= 2 * 16 and alone > 6 * together  # beside two epochs, what workers had begun to read for the probe


@pytest.mark.slow
def test_memory_of_a_study(benchmark):
    _, said = benchmark("study", "--only=memory", "--runs=2", "--images=16", "--epochs=1", "--batch-size=8", "--image-size=8")
    found = dict(re.findall(r"^ *(\S.*?) +([\d.]+) *$", said, re.M))
    assert float(found["resident set, one run"]) > 100 and float(found["a student's own: gradients and activations of a step"]) > 1


@pytest.mark.slow  # starts a server
def test_a_served_teacher_is_timed_in_both_processes(benchmark):
    numbers, said = benchmark("served", *SERVED)
    assert "resnet20: CPU" in said and "resnet20: wall" in said
    assert len(numbers) >= 16 and all(number > 0 for number in numbers), said
