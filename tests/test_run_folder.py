"""The folder of a run, apart from training in it."""

import json

import pytest
from training import write

from kdkit import recipe
from kdkit.dataset_source import DataInfo
from kdkit.errors import RunError
from kdkit.run_folder import Result, RunFolder

INFO = DataInfo((1, 8, 8), num_classes=10, num_train=1000, num_test=797)


def lines(*what):
    return [{"kind": kind, "stage": stage, "epoch": epoch, "step": step} for kind, stage, epoch, step in what]


def test_what_will_be_written_again_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    told = lines(
        ("step", "a", 0, 1), ("step", "a", 0, 2), ("epoch", "a", 1, 2), ("step", "a", 1, 3), ("step", "b", 0, 1), ("epoch", "b", 1, 2)
    )
    for line in told:
        folder.log(**line)
    with folder.metrics_file.open("a") as stream:
        stream.write('{"kind": "step", "sta')
    folder.forget("b", 9, 9)
    assert folder.metrics("step") + folder.metrics("epoch") == [t for t in told if t["kind"] == "step"] + [
        t for t in told if t["kind"] == "epoch"
    ]
    folder.forget("a", 0, 2)  # stopped behind the last step of an epoch, which is not closed yet
    assert folder.metrics("step") == lines(("step", "a", 0, 1), ("step", "a", 0, 2), ("step", "b", 0, 1))
    assert folder.metrics("epoch") == lines(("epoch", "b", 1, 2))
    folder.forget("b", 0, 0)
    assert [json.loads(line)["stage"] for line in folder.metrics_file.read_text().splitlines()] == ["a", "a"]


def test_a_result_is_read_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path)
    result = Result(
        tmp_path,
        "name",
        3,
        {"top1": 50.0},
        10,
        1.5,
        2.5,
        2,
        {"top1": 40.0},
        {"epoch": 1},
        {"top1": 60.0},
        ({"top1": 49.0},),
        {"top1": 51.0},
        warnings=("careful",),
        averaged=(2, 5),
        last={"test": {"top1": 48.0}},
    )
    folder.finish(result)
    assert folder.result() is None  # its student is not there
    folder.student_file.touch()
    assert folder.result() == result
    assert result.student == folder.student_file


def test_the_recipe_in_the_folder_is_the_resolved_one(tmp_path):
    loaded = recipe.load(write(tmp_path), {"train.epochs": 7})
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match="no run folder"):
        folder.recipe()
    assert not folder.holds(loaded)
    with folder.claimed(loaded, INFO):
        assert folder.holds(loaded)
    assert folder.recipe().spec.train.epochs == 7
    assert folder.recipe().fingerprint == loaded.fingerprint
    assert not folder.holds(recipe.load(tmp_path / "recipe.yaml"))
    about = json.loads(folder.marker.read_text())
    assert about["versions"].keys() >= {"python", "torch", "kdkit"}


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder(tmp_path / "run").check(recipe.load(write(tmp_path)))


def test_what_a_running_process_stands_in_is_not_checked_twice(tmp_path):
    """Two claims of one process exclude each other too."""
    loaded = recipe.load(write(tmp_path))
    with (
        RunFolder(tmp_path / "run").claimed(loaded, INFO),
        pytest.raises(RunError, match="another process"),
        RunFolder(tmp_path / "run").claimed(loaded, INFO),
    ):
        pass
