"""Files that are whole or not there."""

import os

import pytest
import torch

from kdkit.files import write_atomically
from kdkit.runs.checkpoints import Checkpoints


def names(folder):
    return sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())


def test_the_newest_checkpoint_is_loaded_with_its_values(tmp_path):
    checkpoints = Checkpoints(tmp_path / "made")
    assert checkpoints.load_newest("stage0") == (None, {})
    state = {"weights": torch.rand(3), "epoch": 2, "scores": [{"test": {"top1": 1.5}}], "none": None}
    checkpoints.save("stage0", 1, {"epoch": 1})
    checkpoints.save("stage0", 2, state)
    checkpoints.save("stage1", 9, {"epoch": 0})
    found, broken = checkpoints.load_newest("stage0")
    assert torch.equal(found.pop("weights"), state.pop("weights"))
    assert (found, broken) == (state, {})
    checkpoints.discard("stage0")
    assert names(tmp_path / "made") == ["stage1-00000009"]


def test_few_checkpoints_are_kept_and_those_of_other_stages_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("stage1", 1, {})
    (tmp_path / ".left.part").touch()
    for number in (1, 2, 10, 99_999_999, 100_000_000):
        checkpoints.save("stage0", number, {"number": number})
    assert names(tmp_path) == ["stage0-100000000", "stage0-99999999", "stage1-00000001"]
    assert checkpoints.load_newest("stage0")[0] == {"number": 100_000_000}
    checkpoints.save("stage0", 100_000_000, {"number": "again"}, keep=1)
    assert len(names(tmp_path)) == 2
    assert checkpoints.load_newest("stage0")[0] == {"number": "again"}


def test_a_damaged_later_checkpoint_goes_when_training_has_gone_on(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    good, bad = checkpoints.save("stage0", 4, {"number": 4}), checkpoints.save("stage0", 8, {"number": 8})
    bad.write_bytes(bad.read_bytes()[:-1])
    assert checkpoints.load_newest("stage0") == ({"number": 4}, {bad: "is damaged"})
    checkpoints.save("stage0", 6, {"number": 6})
    assert not bad.exists()
    assert good.exists()
    assert checkpoints.load_newest("stage0") == ({"number": 6}, {})


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("stage0", 1, {"run": "ours"})
    theirs = checkpoints.save("stage0", 2, {"run": "theirs"})
    assert checkpoints.load_newest("stage0", "ours") == ({"run": "ours"}, {theirs: "is of another recipe's run"})
    checkpoints.save("stage0", 3, {"by": "an older kdkit"})
    assert checkpoints.load_newest("stage0", "ours") == ({"by": "an older kdkit"}, {})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(range(256)) * 16])
def test_a_file_that_is_no_checkpoint_is_passed_over(tmp_path, content):
    import hashlib

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("stage0", 1, {"number": 1})
    file = tmp_path / f"stage0-00000002-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    file.write_bytes(content)
    (tmp_path / "notes.pt").write_bytes(content)
    assert checkpoints.load_newest("stage0") == ({"number": 1}, {file: "is damaged"})


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "file"
    write_atomically(file, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    assert file.stat().st_mode & 0o777 == 0o644
