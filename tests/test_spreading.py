"""Processes of one launch that work on their own."""

import multiprocessing
import os

import pytest
from test_lockstep import BASE, VARIANTS
from training import PATIENCE, assert_same_run, free_port, merged, together, write

import kdkit
from kdkit.runs.spreading import Crew

FORK = multiprocessing.get_context("fork")


def test_a_process_alone_has_no_crew(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Crew.of_launch() is None


def work(rank, port, told):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    crew = Crew.of_launch()
    assert "WORLD_SIZE" not in os.environ
    crew.in_turn(lambda: told.put(rank))
    found = crew.gather({"rank": rank, "mine": crew.share("abcdefg")})
    told.put(found)


def test_they_share_wait_and_tell():
    told, port = FORK.Queue(), free_port()
    crew = [FORK.Process(target=work, args=(rank, port, told)) for rank in (2, 1, 0)]
    for process in crew:
        process.start()
    found = [told.get(timeout=PATIENCE) for _ in range(6)]
    for process in crew:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert [one for one in found if isinstance(one, int)] == [0, 1, 2]
    everyone = [{"rank": 0, "mine": ["a", "d", "g"]}, {"rank": 1, "mine": ["b", "e"]}, {"rank": 2, "mine": ["c", "f"]}]
    assert [one for one in found if isinstance(one, list)] == [everyone] * 3


@pytest.mark.parametrize("words", [[], ["--spread"]])
def test_a_study_in_two_processes(tmp_path, words):
    """Spread, each process trains groups alone; else both train every run together."""
    path = write(tmp_path, {**merged(BASE, VARIANTS["response"]), "name": "plain"}, "response.yaml")
    (tmp_path / "study.yaml").write_text(
        "name: s\nbase: response.yaml\nvariants: {plain: {}, bare: {losses: [{use: cross_entropy}]}}\nseeds: 2\n"
    )
    both = [command.finish() for command in together(tmp_path, "compare", "study.yaml", *words)]
    assert [code for code, _ in both] == [0, 0], both
    assert both[0][1].count("top-1 %") == 1 and "top-1 %" not in both[1][1]
    if words:
        assert "side by side, seed 0" in both[0][1] and "side by side, seed 1" in both[1][1]
        for seed in range(2):
            kdkit.train(path, overrides={"seed": seed}, folder=tmp_path / f"alone{seed}", quiet=True)
            assert_same_run(tmp_path / f"alone{seed}", tmp_path / "runs" / "s" / f"plain-seed{seed}")


def wait_for_the_other(rank, port, told):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    crew = Crew.of_launch()
    crew.gather(rank)
    if rank == 1:
        os._exit(9)
    try:
        crew.gather(rank)
    except kdkit.RunError as error:
        told.put(str(error))


def test_one_that_dies_is_noticed_without_a_launcher():
    told, port = FORK.Queue(), free_port()
    crew = [FORK.Process(target=wait_for_the_other, args=(rank, port, told)) for rank in (0, 1)]
    for process in crew:
        process.start()
    assert told.get(timeout=PATIENCE) == "another process of this launch has ended, so this one ends too; the same command goes on"
    for process in crew:
        process.join(PATIENCE)


def test_a_run_that_fails_in_both_processes_does_not_stop_the_other(tmp_path):
    write(tmp_path, {**merged(BASE, VARIANTS["response"]), "name": "plain"}, "response.yaml")
    wild = "{train: {optimizer: {lr: 1.0e+30}}}"
    (tmp_path / "study.yaml").write_text(
        f"name: s\nbase: response.yaml\nvariants: {{plain: {{}}, wild: {wild}}}\nseeds: 1\nallow: [train.optimizer.lr]\n"
    )
    both = [command.finish() for command in together(tmp_path, "compare", "study.yaml")]
    assert [code for code, _ in both] == [1, 0], both
    assert "failed: wild, seed 0" in both[0][1] and "1 runs trained" in both[0][1]
