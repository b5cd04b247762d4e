"""The estimate of the time that a study still takes."""

import json

import pytest

from kdkit.study import time_left
from kdkit.study.time_left import TimeLeft


def logged(folder, epochs):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"kind": "epoch", "stage": "train", "epoch": n + 1, "step": n}) for n in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("before", "after", "more", "finished", "says"),
    [
        ((0, 0), (0, 0), 0, False, ""),
        ((0, 0), (5, 5), 0, False, ", about 0:01:40 left in all"),  # half is done in 100 s
        ((5, 0), (5, 0), 0, False, ""),  # what was done before took no time of this call
        ((5, 0), (5, 5), 0, False, ", about 0:03:20 left in all"),
        ((0, 0), (4, 4), 2, False, ", about 0:01:40 left in all"),
        ((0, 0), (3, 5), 0, True, ", about 0:00:33 left in all"),  # the first has ended early
        ((0, 0), (10, 10), 0, False, ", about 0:00:00 left in all"),
    ],
)
def test_the_rest_takes_as_long_as_what_is_done(tmp_path, monkeypatch, before, after, more, finished, says):
    now = 1000.0
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now)
    folders = [tmp_path / name for name in "ab"]
    for folder, count in zip(folders, before, strict=True):
        logged(folder, count)
    left = TimeLeft(dict.fromkeys(folders, 10))
    for folder, count in zip(folders, after, strict=True):
        logged(folder, count)
    now += 100.0
    if finished:
        (folders[0] / "result.json").write_text("{}")
    assert left.told(more) == says
