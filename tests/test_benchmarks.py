import runpy
from pathlib import Path

import pytest
import torch

from kdkit import registry

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOSSES = runpy.run_path(str(BENCHMARKS / "losses.py"))


def test_every_loss_is_timed(capsys):
    LOSSES["main"](["--size", "small", "--steps", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows[1:]} == set(registry.load().losses)
    compared = {row[0]: row[-1] for row in rows if row[-1].endswith("x")}
    assert set(LOSSES["NAIVE"]) == set(compared)
    assert float(compared["crd"][:-1]) > 10  # its memory


def test_a_naive_form_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setitem(LOSSES["NAIVE"], "nst", lambda loss, student, teacher, batch: 0 * student.features["late"].sum())
    with pytest.raises(AssertionError, match="nst's naive form gives another value"):
        LOSSES["main"](["--size", "small", "--steps", "1", "--losses", "nst"])


def test_peak_memory_counts_what_is_there_at_once():
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB

    def run():
        value = (2 * x).exp().sum()  # a factor freed at once, and a result that is kept for backward
        value.backward()
        x.grad = None

    assert LOSSES["peak_memory"](run) == pytest.approx(2 * 2**20, rel=0.6)
    assert LOSSES["peak_memory"](lambda: [torch.ones(2**18) for _ in range(10)] and None) == pytest.approx(10 * 2**20, rel=0.01)
    assert LOSSES["peak_memory"](lambda: [torch.ones(2**18).sum() for _ in range(10)] and None) == pytest.approx(2**20, rel=0.01)
