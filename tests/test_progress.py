"""What a run says."""

import io

import pytest
from rich.console import Console

from kdkit.contracts.task import ScoreInfo
from kdkit.runs import progress
from kdkit.runs.progress import Reporter, Seldom

SHARE = ScoreInfo(name="top1", title="top-1", unit="%")
ERROR = ScoreInfo(name="rmse", title="RMSE", unit="m", digits=3, higher_is_better=False)
TERMS = {"loss": 1.5, "kl": 0.5, "kl.weighted": 1.0, "cross_entropy": 1.0, "cross_entropy.weighted": 0.5}


def reporter(quiet=False, terminal=False):
    made = Reporter(quiet=quiet)
    made.console = Console(file=io.StringIO(), soft_wrap=True, highlight=False, force_terminal=terminal)
    return made


def test_the_progress_of_an_epoch_is_a_line_with_every_term():
    made = reporter()
    made.epoch("distill epoch 1/2", TERMS, 0.05, 1234.4, [(SHARE, 12.25)], 3725.0)
    expected = (
        "distill epoch 1/2  loss 1.5 = kl 0.5 (1) + cross_entropy 1 (0.5)  test top-1 12.25 %  lr 0.05  1,234 samples/s  1:02:05 left\n"
    )
    assert made.console.file.getvalue() == expected


def test_a_progress_line_is_broken_between_its_parts_on_a_narrow_terminal():
    made = reporter(terminal=True)
    made.console.width = 61
    terms = {"loss": 1.5, "kl": 1.5, "kl.weighted": 1.5}
    made.epoch("distill epoch 1/2", terms, 0.05, 1234.4, [(SHARE, 12.25), (ERROR, 2.5)], 5.0)
    assert made.console.file.getvalue().splitlines() == [
        "distill epoch 1/2  loss 1.5 = kl 1.5",
        "    test top-1 12.25 %, RMSE 2.500 m  lr 0.05",
        "    1,234 samples/s  0:00:05 left",
    ]


def test_warnings_are_said_once_also_when_quiet():
    made = reporter(quiet=True)
    made.say("nothing")
    for text in ("first", "second", "first"):
        made.warn(text)
    assert made.console.file.getvalue() == "warning: first\nwarning: second\n"
    assert made.warnings == ["first", "second"]


def test_the_progress_bar_lives_on_a_terminal_and_as_long_as_training():
    plain, live = reporter(), reporter(terminal=True)
    with plain.training("distill", 10, 0):
        assert not plain.due()
        plain.step(1, "epoch 1/2", TERMS, 0.1, 10)
    assert plain.console.file.getvalue() == ""
    with pytest.raises(ValueError), live.training("distill", 10, 4):
        assert live.due()
        live.step(5, "epoch 1/2", TERMS, 0.1, 10)
        assert not live.due()
        raise ValueError
    assert not live.due()
    assert "distill" in live.console.file.getvalue()


def test_signs_of_progress_are_seldom(monkeypatch):
    """At most one in so many seconds, so that a log of many short epochs stays short."""
    now, told = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tell = Seldom(told.append, seconds=10)
    for second in range(31):
        now[0] = float(second)
        tell(second)
    assert told == [10, 20, 30]


def test_a_quiet_run_tells_its_epochs_to_whoever_wants_them():
    told = []
    made = Reporter(quiet=True, instead=told.append)
    made.console = Console(file=io.StringIO())
    made.epoch("train epoch 1/2", TERMS, 0.05, 100.0, [(SHARE, 50.0)], 10.0)
    assert made.console.file.getvalue() == "" and len(told) == 1 and told[0].startswith("train epoch 1/2  loss 1.5")
