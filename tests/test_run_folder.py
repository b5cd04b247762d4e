"""The folder of a run, apart from training in it."""

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from training import PATIENCE, write

from kdkit import recipe
from kdkit.contracts.dataset_source import DataInfo
from kdkit.errors import RunError
from kdkit.runs.folder import RunFolder
from kdkit.runs.result import Result

INFO = DataInfo((1, 8, 8), num_classes=10, num_train=1000, num_test=797)
FORK = multiprocessing.get_context("fork")


def lines(*what):
    return [{"kind": kind, "stage": stage, "epoch": epoch, "step": step} for kind, stage, epoch, step in what]


def test_metrics_that_will_be_written_again_are_left_out(tmp_path):
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


def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder(tmp_path / "run").check(recipe.load(write(tmp_path)))


def test_a_run_folder_in_use_is_not_checked_twice(tmp_path):
    """Two claims of one process exclude each other too."""
    loaded = recipe.load(write(tmp_path))
    with (
        RunFolder(tmp_path / "run").claimed(loaded, INFO),
        pytest.raises(RunError, match="another process"),
        RunFolder(tmp_path / "run").claimed(loaded, INFO),
    ):
        pass


@pytest.mark.parametrize(
    ("left", "gives_way"),
    [
        ({}, True),
        ({"metrics.jsonl": '{"kind": "step", "stage": "a", "epoch": 0, "step": 1}\n'}, True),
        ({"metrics.jsonl": '{"kind": "epoch", "stage": "a", "epoch": 1, "step": 6}\n'}, False),
        ({"checkpoints/stage0-00000001-0123456789abcdef.pt": "anything"}, False),
        ({"student.safetensors": "anything"}, False),
        ({"result.json": "{}"}, False),
    ],
    ids=["nothing", "steps", "an epoch", "a checkpoint", "a student", "a result"],
)
def test_a_run_that_has_trained_nothing_gives_way_to_another_recipe(tmp_path, left, gives_way):
    folder = RunFolder(tmp_path / "run")
    with folder.claimed(recipe.load(write(tmp_path)), INFO):
        pass
    for name, text in left.items():
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text(text)
    another = recipe.load(write(tmp_path), {"train.epochs": 7})
    if not gives_way:
        with pytest.raises(RunError, match="holds a run of another recipe .different: train.epochs"):
            folder.check(another)
        return
    with folder.claimed(another, INFO):
        assert folder.holds(another) and not folder.metrics("step")


def test_restart_leaves_alone_what_is_behind_a_link(tmp_path):
    loaded, folder = recipe.load(write(tmp_path)), RunFolder(tmp_path / "run")
    with folder.claimed(loaded, INFO):
        pass
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "snapshots").symlink_to(tmp_path / "elsewhere")
    (folder.path / "result.json").write_text("{}")
    with (
        pytest.raises(RunError, match=r"run/snapshots: is a link to a folder.*remove the link first"),
        folder.claimed(loaded, INFO, restart=True),
    ):
        pass
    assert (folder.path / "result.json").exists(), "nothing was removed"


def test_a_folder_that_cannot_be_made_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(write(tmp_path))
    (tmp_path / "file").touch()
    says = rf"{tmp_path}/file/run: cannot be written: Not a directory; the run is written there .`run.folder`, or `--run FOLDER`"
    with pytest.raises(RunError, match=says), RunFolder(Path("file/run")).claimed(loaded, INFO):
        pass


def claim_and_fork(recipe_file, folder, pipe):
    with RunFolder(folder).claimed(recipe.load(recipe_file), INFO):
        worker = FORK.Process(target=time.sleep, args=(PATIENCE,))
        worker.start()
        pipe.send(worker.pid)
        time.sleep(PATIENCE)


def test_a_worker_that_outlives_a_killed_process_does_not_keep_the_folder(tmp_path):
    path, (here, there) = write(tmp_path), FORK.Pipe()
    owner = FORK.Process(target=claim_and_fork, args=(path, tmp_path / "run", there))
    owner.start()
    worker = here.recv()
    try:
        with pytest.raises(RunError, match="another process"), RunFolder(tmp_path / "run").claimed(recipe.load(path), INFO):
            pass
        owner.kill()
        owner.join()
        RunFolder(tmp_path / "run").wait()
        with RunFolder(tmp_path / "run").claimed(recipe.load(path), INFO):
            os.kill(worker, 0)  # it is still there
    finally:
        owner.kill()
        os.kill(worker, signal.SIGKILL)


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="run: cannot be written"), RunFolder(tmp_path / "run").claimed(recipe.load(write(tmp_path)), INFO):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize("write_it", ["whole", "a line"])
def test_a_full_disk_is_told_with_the_file(tmp_path, write_it):
    folder = RunFolder(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as told:
            folder.keep(folder.student_file, bytes(200)) if write_it == "whole" else folder.log(kind="step", stage="a" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.filename == str(folder.student_file if write_it == "whole" else folder.metrics_file)
    assert told.value.strerror == "File too large"
    assert [path.name for path in tmp_path.iterdir()] in ([], ["metrics.jsonl"]), "no part of it is left"


def test_damaged_lines_are_told_and_a_run_that_goes_on_leaves_them_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claimed(recipe.load(write(tmp_path)), INFO):
        for step in range(3):
            folder.log(kind="step", stage="a", epoch=0, step=step)
    first, second, third = folder.metrics_file.read_text().splitlines()
    changed = second.replace('"step": 1', '"step": 7')
    folder.metrics_file.write_text("\n".join([first, changed, third, ""]))
    with pytest.raises(
        RunError, match=r"metrics\.jsonl:2: is damaged: its content does not match its `crc`, or it is another.s; delete this line"
    ):
        folder.metrics("step")
    lost = folder.forget("a", 1, 9)
    assert len(lost) == 2 and "metrics.jsonl:2" in lost[0] and "has nothing of epoch 1 of stage 'a' any more" in lost[1]
    assert [line["step"] for line in folder.metrics("step")] == [0, 2]
