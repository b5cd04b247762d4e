"""Processes that share a study, of one launch or of several, and those of a launch that agree."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal

import pytest
from test_lockstep import BASE, VARIANTS
from training import PATIENCE, Command, assert_same_run, free_port, lines, merged, together, write

import kdkit
from kdkit import launching
from kdkit.runs.agreement import agreed
from kdkit.runs.folder import RunFolder
from kdkit.study import comparison, loading
from kdkit.study.finder import Finder
from kdkit.study.plan import trainings

FORK = multiprocessing.get_context("fork")
SHARE = ("compare", "study.yaml", "--spread")
GONE = "another process of this launch has ended, so this one ends too; the same command goes on"


def study(folder, seeds=2, epochs=2, variants="{plain: {}, bare: {losses: [{use: cross_entropy}]}}", **more):
    """A study of small runs, and the path of its base."""
    base = {**merged(BASE, VARIANTS["response"]), "name": "plain"}
    path = write(folder, merged(base, {"train": {"epochs": epochs}, **more}), "response.yaml")
    (folder / "study.yaml").write_text(f"name: s\nbase: response.yaml\nvariants: {variants}\nseeds: {seeds}\nallow: [train.optimizer.lr]\n")
    return path


def run_of(folder, seed, variant="plain"):
    return folder / "runs" / "s" / f"{variant}-seed{seed}"


def assert_as_alone(folder, path, seeds=2):
    for seed in range(seeds):
        kdkit.train(path, overrides={"seed": seed}, folder=folder / f"alone{seed}", quiet=True)
        assert_same_run(folder / f"alone{seed}", run_of(folder, seed))


def said_by(command):
    return command.log.read_text() if command.log.exists() else ""


def table(log):
    return log[log.index("top-1 %") :]


def agree(rank, port, told, dies):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        for time in range(3):
            with agreed() as asked:
                if rank == dies and time == 1:
                    os._exit(9)
                asked["time"] = time
        launching.leave_launch()
        told.put("agreed" if launching.of_launch() == (0, 1) else "still in the launch")
    except kdkit.RunError as error:
        told.put(str(error))


@pytest.mark.first(1)
@pytest.mark.parametrize(("dies", "says"), [(None, ["agreed"] * 3), (0, [GONE] * 2), (2, [GONE] * 2)])
def test_processes_agree_until_one_dies(dies, says):
    """One that dies is noticed without a launcher; it may be the one that hosts the store."""
    told, port = FORK.Queue(), free_port()
    launch = [FORK.Process(target=agree, args=(rank, port, told, dies)) for rank in (2, 1, 0)]
    for process in launch:
        process.start()
    assert [told.get(timeout=PATIENCE) for _ in says] == says
    for process in launch:
        process.join(PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--spread"]])
def test_a_study_in_two_processes_of_a_launch(tmp_path, words):
    """Spread, each process trains groups alone; else both train every run together."""
    path = study(tmp_path)
    both = [command.finish() for command in together(tmp_path, "compare", "study.yaml", *words)]
    assert [code for code, _ in both] == [0, 0], both
    assert both[0][1].count("top-1 %") == 1 and "top-1 %" not in both[1][1]
    if words:
        for seed in range(2):
            assert sum(log.count(f"side by side, seed {seed}") for _, log in both) == 1, both
        assert_as_alone(tmp_path, path)


@pytest.mark.slow
def test_processes_without_a_launcher_share_a_study(tmp_path):
    """Each run, and the teacher of all, is trained once; both print the same table."""
    path = study(tmp_path, teacher=None)
    teacher = {**merged(BASE, VARIANTS["alone"]), "name": "teacher"}
    write(tmp_path, merged(teacher, {"train": {"epochs": 8}}), "teacher.yaml")
    path.write_text(path.read_text().replace("teacher: null", "teacher: {recipe: teacher.yaml}"))
    first = Command(tmp_path, *SHARE)
    assert first.wait_for(lambda: lines(tmp_path / "runs" / "teacher"))
    first.send(signal.SIGSTOP)
    second = Command(tmp_path, *SHARE)
    assert second.wait_for(lambda: "teacher: another process is training the teacher" in said_by(second))
    first.send(signal.SIGCONT)
    both = [command.finish() for command in (first, second)]
    assert [code for code, _ in both] == [0, 0], both
    assert table(both[0][1]) == table(both[1][1])
    assert "4 runs trained for this study" in " ".join(table(both[0][1]).split())
    for number, (_, log) in enumerate(both):
        assert log.count("side by side") == 1 and f"side by side, seed {number}" in log, both
    assert_as_alone(tmp_path, path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_what_a_process_leaves_another_goes_on_with(tmp_path, number):
    path = study(tmp_path, seeds=1, epochs=5)
    first = Command(tmp_path, *SHARE)
    assert first.wait_for(lambda: list(run_of(tmp_path, 0).glob("checkpoints/*.pt")))
    first.send(signal.SIGSTOP)
    second = Command(tmp_path, *SHARE)
    waits = "waiting for what other processes train: plain-seed0, bare-seed0"
    assert second.wait_for(lambda: waits in said_by(second))
    begun = (run_of(tmp_path, 0) / "metrics.jsonl").read_text().splitlines()[0]
    first.send(number)
    first.send(signal.SIGCONT)
    code, said = first.finish()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "s: stopped with 0 of 2 runs finished; the same command goes on where it was" in said
    code, said = second.finish()
    assert code == 0 and "2 runs side by side" in said and "top-1 %" in said, said
    assert (run_of(tmp_path, 0) / "metrics.jsonl").read_text().startswith(begun), "it was begun anew"
    assert_as_alone(tmp_path, path, seeds=1)


@pytest.mark.slow
def test_each_process_tries_what_fails_once(tmp_path):
    study(tmp_path, seeds=1, variants="{plain: {}, wild: {train: {optimizer: {lr: 1.0e+30}}}}")
    both = [command.finish() for command in [Command(tmp_path, *SHARE) for _ in range(2)]]
    assert [code for code, _ in both] == [1, 1], both
    assert all(log.count("wild-seed0: failed: ") == 1 and "failed: wild, seed 0" in log for _, log in both), both
    assert json.loads((run_of(tmp_path, 0) / "result.json").read_text())["epochs"] == 2


@pytest.mark.slow
def test_a_run_that_fails_in_both_processes_does_not_stop_the_other(tmp_path):
    study(tmp_path, seeds=1, variants="{plain: {}, wild: {train: {optimizer: {lr: 1.0e+30}}}}")
    both = [command.finish() for command in together(tmp_path, "compare", "study.yaml")]
    assert [code for code, _ in both] == [1, 0], both
    assert "failed: wild, seed 0" in both[0][1] and "1 runs trained" in both[0][1]


@pytest.mark.first(1)
@pytest.mark.parametrize("whose", ["same", "fewer seeds", "old"])
def test_who_waited_for_the_findings_of_another_reads_them(tmp_path, monkeypatch, whose):
    study(tmp_path, epochs=1)
    monkeypatch.chdir(tmp_path)
    loaded, made, locked = loading.load([tmp_path / "study.yaml"]), [], comparison._measured
    first = comparison.compare(loaded, spread=True)
    few = comparison.compare(loading.load([tmp_path / "study.yaml"], seeds=1), spread=True)
    first.save(loaded.path / comparison.FINDINGS)

    @contextlib.contextmanager
    def waited(*given):
        with locked(*given) as measured:
            if whose != "old":
                (few if whose == "fewer seeds" else first).save(loaded.path / comparison.FINDINGS)
            yield measured

    monkeypatch.setattr(comparison, "_measured", waited)
    monkeypatch.setattr(comparison, "Finder", lambda *given: made.append(given) or Finder(*given))
    found = comparison.compare(loaded, spread=True)
    assert len(made) == (whose != "same")
    if whose == "same":
        assert found == first
    assert [variant.folders for variant in found.variants] == [variant.folders for variant in first.variants]


def test_a_file_system_without_locks_is_told_in_one_line(tmp_path, monkeypatch):
    def acquire(*given, **named):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(kdkit.RunError, match="run: cannot be locked: No locks available; the run is written there"):
        RunFolder(tmp_path / "run").held()


def test_a_folder_that_another_process_has_only_locked_is_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path)
    planned = [each.folder for each in trainings(loading.load([tmp_path / "study.yaml"]))]
    with RunFolder(planned[0]).held():
        assert [each.folder for each in trainings(loading.load([tmp_path / "study.yaml"]))] == planned
