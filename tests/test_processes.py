"""Processes of one launch: what one refuses, all refuse in one line; one that dies ends the others, and it is said which."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from training import PLAIN, Command, free_port, lines, metrics, needs_a_device_each, start, together, write

from kdkit import launching
from kdkit.data import images
from kdkit.errors import DataError, RecipeError, RunError
from kdkit.runs import agreement

SUPERVISED = {**PLAIN, "teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
LEFT = "the same command goes on from the last checkpoint"


def ends(commands):
    """Exit codes and what each has printed, line by line."""
    found = [command.finish() for command in commands]
    return [code for code, _ in found], [log.splitlines() for _, log in found]


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ([], ["train.optimizer.lr=0.1"]),
            "process 2 of 2 (rank 1) was given another recipe than process 1 (different: train.optimizer.lr); "
            "start all with the same command and the same files",
        ),
        (([], ["student.model=resnet34"]), "(different: student.model)"),
        (([], ["--restart"]), "(different: --restart)"),
        (([], ["train.epochs=0"]), "override: train.epochs: input should be greater than 0, got 0"),
        (([], ["--run", "taken"]), "taken exists and is not a run folder"),
        (([], [], []), "recipe.yaml:9: data.batch_size: 8 images cannot be shared equally by 3 processes"),
    ],
    ids=["rate", "student", "restart", "a value", "a folder", "three processes"],
)
def test_what_one_process_refuses_all_refuse_in_one_line(tmp_path, words, says):
    path = write(tmp_path, SUPERVISED)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    codes, said = ends(start(tmp_path, [["train", path, *more] for more in words]))
    assert codes == [2] * len(words), said
    assert all(log == said[0] and len(log) == 1 and says in log[0] for log in said), said
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_missing_for_one_process_ends_the_others(tmp_path):
    path = write(tmp_path, SUPERVISED)
    codes, said = ends(start(tmp_path, [["train", path], ["train", tmp_path / "nowhere.yaml"]]))
    assert codes == [2, 2] and said[0] == said[1] and "nowhere.yaml" in said[0][0] and len(said[0]) == 1


def test_processes_with_different_studies_train_nothing(tmp_path):
    write(tmp_path, SUPERVISED, "a.yaml")
    write(tmp_path, SUPERVISED, "b.yaml", train={"ema": {"decay": 0.9}})
    study = ["compare", "a.yaml", "b.yaml", "--allow", "train.ema"]
    codes, said = ends(start(tmp_path, [[*study, "--seeds", "1"], [*study, "--seeds", "2"]]))
    assert codes == [2, 2] and "was given another study than process 1 (different: plain (seed 1)" in said[0][-1] == said[1][-1], said
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_loses_another_says_so_in_one_line(tmp_path, killed):
    path = write(tmp_path, SUPERVISED, train={"epochs": 500})
    commands = together(tmp_path, "train", path, "--quiet")
    assert commands[0].wait_for(lambda: lines(tmp_path / "runs" / "plain") > 3)
    commands[killed].send(signal.SIGKILL)
    code, log = commands[1 - killed].finish()
    other = 1 - killed
    assert (code, log) == (1, f"process {other + 1} of 2 (rank {other}): another process has ended, so this one ends too; {LEFT}\n")
    assert commands[killed].finish()[0] == -signal.SIGKILL


def ranks_of(launcher):
    """The processes that a launcher has started, by number."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                words = dict(word.partition("=")[::2] for word in (place / "environ").read_text().split("\0"))
                found[int(words["RANK"])] = int(place.name)
        except (OSError, KeyError, IndexError):
            continue  # it has ended, or is no rank
    return found


def launched(folder, until):
    """A launch of two processes, by now with so many lines of metrics."""
    needs_a_device_each(2)
    path = write(folder, SUPERVISED, train={"epochs": 100_000})
    words = [sys.executable, "-m", "kdkit", "train", str(path), "--processes", "2", "--quiet", "train.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while lines(folder / "runs" / "plain") < until and process.poll() is None:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_one_that_is_killed_in_kdkit_s_own_launch_ends_the_others(tmp_path):
    """The last line says which died of what."""
    first = launched(tmp_path, 3)
    ranks = ranks_of(first.pid)
    os.kill(ranks[1], signal.SIGKILL)
    log = first.communicate()[0].splitlines()
    assert (first.returncode, log[-1]) == (
        128 + signal.SIGKILL,
        f"process 2 of 2 (rank 1, pid {ranks[1]}) was killed by SIGKILL; the others were ended; {LEFT}",
    )
    own = [line for line in log if not line.startswith("[")]  # torch's C++ code may warn of the lost connection
    assert len(own) <= 2 and "Traceback" not in "".join(log), log


@pytest.mark.slow
def test_a_signal_stops_kdkit_s_own_launch_and_the_same_command_goes_on(tmp_path):
    steps = 0
    for _ in range(2):
        process = launched(tmp_path, steps + 30)
        process.send_signal(signal.SIGTERM)
        log = process.communicate()[0]
        assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM in epoch" in log and "Traceback" not in log
        before, steps = steps, len(metrics(tmp_path / "runs" / "plain"))
        assert steps > before


def test_a_launch_that_a_signal_stops_ends_with_its_code(monkeypatch):
    def stopped(*_):
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: stopped)
    monkeypatch.setattr("logging.disable", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launching.launch(2, ["train", "r.yaml"]) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("failures", "says", "code"),
    [
        ({0: (7, 1), 1: (8, -11)}, f"process 2 of 3 (rank 1, pid 8) was killed by SIGSEGV; the others were ended; {LEFT}\n", 139),
        ({0: (7, -6), 2: (9, -15)}, f"process 1 of 3 (rank 0, pid 7) was killed by SIGABRT; the others were ended; {LEFT}\n", 134),
        ({0: (7, 1), 1: (8, 2), 2: (9, -15)}, "", 2),
        ({0: (7, 143), 1: (8, 143)}, "", 143),
        ({2: (9, -99)}, f"process 3 of 3 (rank 2, pid 9) was killed by signal 99; the others were ended; {LEFT}\n", 227),
    ],
)
def test_the_process_that_failed_first_is_told(failures, says, code):
    assert launching.first_failure(failures, 3) == (says, code)


def test_processes_are_started_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launching.must_launch(2) and not launching.must_launch(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launching.must_launch(2)
    with pytest.raises(RecipeError, match="a launcher has started 2 processes already"):
        launching.must_launch(3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launch_whose_processes_do_not_all_come_ends_in_one_line(monkeypatch, rank):
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(agreement, "TO_START", timedelta(seconds=1))
    with pytest.raises(RunError, match=r"the 2 processes of this launch have not all met at 127\.0\.0\.1:\d+ within"):
        agreement._launch_store(rank)


def test_only_errors_about_another_process_are_reworded(monkeypatch):
    lost = RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process has ended" in launching.told_of_another(lost)
    assert launching.told_of_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    monkeypatch.delenv("WORLD_SIZE")
    assert launching.told_of_another(lost) is None


@pytest.mark.parametrize(
    "error",
    [
        EOFError(),
        ConnectionResetError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
    ],
    ids=["end of file", "reset", "signal", "several"],
)
def test_errors_of_a_loader_worker_that_has_ended(error):
    def loader():
        yield 1
        raise error

    found = images.loaded(loader())
    assert next(found) == 1
    with pytest.raises(DataError, match="a process that loads data has ended"):
        next(found)


def test_a_loader_worker_that_is_killed_is_told_in_one_line(tmp_path):
    data = {"batch_size": 4, "workers": 1, "timm_augment": {"auto_augment": None}}
    command = Command(tmp_path, "train", write(tmp_path, SUPERVISED, data=data, train={"epochs": 5000}), "--quiet")
    workers = tmp_path / "workers"

    def found():
        tasks = Path(f"/proc/{command.process.pid}/task").glob("*/children")
        workers.write_text(" ".join(text for task in tasks if (text := task.read_text().strip())))
        return lines(tmp_path / "runs" / "plain") > 3 and workers.read_text()

    assert command.wait_for(found)
    worker = workers.read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    code, log = command.finish()
    assert (code, log) == (2, f"a process that loads data has ended unexpectedly (killed, or out of memory?); {LEFT}\n")


@pytest.mark.slow
def test_processes_of_two_students_train_their_teacher_once(tmp_path):
    write(tmp_path, {**SUPERVISED, "name": "teacher"}, "teacher.yaml", train={"epochs": 10})
    taught = {**PLAIN, "teacher": {"recipe": "teacher.yaml"}, "train": {**PLAIN["train"], "epochs": 1}}
    paths = [write(tmp_path, {**taught, "name": name}, f"{name}.yaml") for name in ("one", "two")]
    first = Command(tmp_path, "train", paths[0])
    assert first.wait_for(lambda: lines(tmp_path / "runs" / "teacher") > 0)
    first.send(signal.SIGSTOP)
    second = Command(tmp_path, "train", paths[1])
    says = "teacher: another process is training the teacher in runs/teacher; waiting for it"
    assert second.wait_for(lambda: second.log.exists() and says in second.log.read_text())
    first.send(signal.SIGCONT)
    codes, (one, two) = ends([first, second])
    assert codes == [0, 0], (one, two)
    assert says in two and "teacher: trained already, see runs/teacher" in two and says not in one
    assert not any("train epoch" in line for line in two)
