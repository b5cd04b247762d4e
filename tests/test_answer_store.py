"""Rows of a teacher's answers on disk: written once, whole or not there, shared by processes."""

import fcntl
import multiprocessing
import os
import signal
import time

import pytest
import torch
from training import PATIENCE

from kdkit.cache import store as answer_store
from kdkit.cache.folder import clear, look, stores
from kdkit.cache.rows import Column
from kdkit.cache.store import EMPTY, ON_DISK, WRITTEN, AnswerStore
from kdkit.errors import RunError

COLUMNS = [Column("logits", (5,), "float16"), Column("tap a", (3, 2), "bfloat16"), Column("best", (2,), "int16")]
COUNT = 400
NAME = "teacher-0123456789abcdef"
COMMITS = 5  # seed of a writer that commits after each round
FORK = multiprocessing.get_context("fork")


def opened(folder, columns=COLUMNS, count=COUNT):
    return AnswerStore(folder / NAME, columns, count, {"teacher": "t", "data": "d", "views": 1, "images": count})


def values(rows, columns=COLUMNS):
    """What belongs in a row follows from its number."""
    return {c.name: (rows.view(-1, *[1] * len(c.shape)) * torch.ones(c.shape)).to(c.type) for c in columns}


def assert_right(store, rows):
    expected = values(rows, store.columns)
    for name, value in store.read(rows).items():
        assert torch.equal(value, expected[name]), name


def test_rows_written_into_the_store_are_read(tmp_path):
    store = opened(tmp_path)
    rows = torch.tensor([7, 3, 399, 0])
    assert not store.known(rows).any()
    store.write(rows, values(rows))
    assert store.known(rows).all() and store.known(torch.arange(COUNT)).sum() == 4
    assert_right(store, torch.tensor([399, 3, 3, 7, 0]))
    store.close()
    again = opened(tmp_path)
    assert again.known(rows).all()
    assert_right(again, rows)


def test_a_row_of_the_store_does_not_change(tmp_path):
    store = opened(tmp_path)
    rows = torch.tensor([1, 2])
    store.write(rows, values(rows))
    store.write(torch.tensor([2, 4, 4]), values(torch.tensor([100, 4, 4])))  # another answer to 2
    assert_right(store, torch.tensor([1, 2, 4]))


def test_files_of_the_store_are_sparse_and_sizes_are_told(tmp_path):
    columns = [Column("logits", (1024,), "float32")]  # a page each
    store = opened(tmp_path, columns, 100_000)
    every = torch.arange(100_000)
    assert store.missing_bytes(every) == 100_000 * 4096
    assert store.allocated() < 1 << 20
    rows = torch.arange(0, 100_000, 5000)
    store.write(rows, values(rows, columns))
    store.commit()
    assert len(rows) * 4096 <= store.allocated() < 2 << 20
    assert store.missing_bytes(every) == (100_000 - len(rows)) * 4096
    assert opened(tmp_path / "small", [Column("logits", (4,), "float16")], 4096).missing_bytes(torch.arange(4096)) == 4096 * 8


def test_rows_that_never_reached_the_disk_are_forgotten_when_nobody_uses_the_store(tmp_path):
    store = opened(tmp_path)
    kept, lost = torch.tensor([1, 2]), torch.tensor([3, 4])
    store.write(kept, values(kept))
    store.commit()
    store.write(lost, values(lost))
    beside = opened(tmp_path)  # while the first is alive, its rows count
    assert beside.known(lost).all()
    assert_right(beside, lost)
    for one in (store, beside):  # as a machine that fails would
        one._lock.close()
    later = opened(tmp_path)
    assert later.known(kept).all() and not later.known(lost).any()
    later.write(lost, values(lost))
    assert_right(later, torch.cat([kept, lost]))


def test_the_store_marks_a_row_only_after_its_values_are_on_disk(tmp_path, monkeypatch):
    """Every flush of a column comes before the marks."""
    store, order = opened(tmp_path), []

    class Watched:
        def __init__(self, pages, name):
            self.pages, self.name = pages, name

        def flush(self):
            marks = store._states[torch.tensor([5])].item()
            order.append((self.name, marks))
            self.pages.flush()

    store._pages = [Watched(pages, "column") for pages in store._pages]
    store._marks = Watched(store._marks, "marks")
    rows = torch.tensor([5])
    store.write(rows, values(rows))
    store.commit()
    assert order == [("column", WRITTEN)] * (len(COLUMNS) + 1) + [("marks", ON_DISK)]
    assert store._states[torch.tensor([6])].item() == EMPTY


def write_random_rows(folder, seed, rounds):
    torch.set_num_threads(1)
    store = opened(folder)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        rows = torch.randint(COUNT, (16,), generator=generator)
        store.write(rows, values(rows))
        known = torch.arange(COUNT)[store.known(torch.arange(COUNT))]
        assert_right(store, known)
        if seed == COMMITS:
            store.commit()
    store.close()


def test_processes_write_one_store_together(tmp_path):
    writers = [FORK.Process(target=write_random_rows, args=(tmp_path, seed, 60)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = opened(tmp_path)
    known = torch.arange(COUNT)[store.known(torch.arange(COUNT))]
    assert len(known) > COUNT * 0.9
    assert_right(store, known)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("after", [0.03, 0.06, 0.1, 0.15])
def test_a_killed_writer_leaves_no_wrong_row_in_the_store(tmp_path, after, watched):
    """Whether its marks are forgotten afterwards, or stay because another process has the store open."""
    other = opened(tmp_path) if watched else None
    writer = FORK.Process(target=write_random_rows, args=(tmp_path, COMMITS, 100_000))
    writer.start()
    until = time.monotonic() + PATIENCE
    while not (tmp_path / NAME / answer_store.MARKER).exists() or look(tmp_path / NAME).filled < 20:
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(after)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    store = opened(tmp_path)
    known = torch.arange(COUNT)[store.known(torch.arange(COUNT))]
    assert len(known) > 0
    assert_right(store, known)
    rows = torch.arange(COUNT)
    store.write(rows, values(rows))
    assert_right(other or store, rows)


def test_a_half_made_store_is_made_anew(tmp_path):
    opened(tmp_path).close()
    (tmp_path / NAME / answer_store.MARKER).unlink()  # which comes last
    (tmp_path / NAME / "column-0.bin").write_bytes(b"half")
    assert stores(tmp_path) == []
    store = opened(tmp_path)
    rows = torch.tensor([9])
    store.write(rows, values(rows))
    assert_right(store, rows)


def test_damaged_files_of_the_store_are_refused(tmp_path):
    opened(tmp_path).close()
    os.truncate(tmp_path / NAME / "column-1.bin", 10)
    with pytest.raises(RunError, match=rf"column-1.bin is damaged or missing; `kdkit cache --clear {NAME} --dir {tmp_path}`"):
        opened(tmp_path)


def test_the_store_tells_of_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    store = opened(tmp_path)
    rows = torch.arange(8)
    monkeypatch.setattr(answer_store.shutil, "disk_usage", lambda path: type("", (), {"free": answer_store.RESERVE + 1000})())
    with pytest.raises(RunError, match=r"the disk has 268 MB left, too little .*`what: logits`"):
        store.write(rows, values(rows))
    assert not store.known(rows).any()


def test_stores_are_listed_and_removed(tmp_path):
    store = opened(tmp_path)
    rows = torch.arange(8)
    store.write(rows, values(rows))
    store.close()
    (tmp_path / "notes").mkdir()  # no store
    (found,) = stores(tmp_path)
    assert (found.path.name, found.filled, found.about["count"]) == (NAME, 8, COUNT) and found.bytes > 0
    assert found == look(tmp_path / NAME)
    with pytest.raises(RunError, match="is called 'teacher-0123'; did you mean"):
        clear(tmp_path, "teacher-0123")
    assert [gone.path.name for gone in clear(tmp_path)] == [NAME]
    assert stores(tmp_path) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["notes"]
    assert clear(tmp_path) == []


def test_a_store_in_use_is_not_removed(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(RunError, match="is in use; nothing was removed"):
        clear(tmp_path)
    rows = torch.tensor([1])
    store.write(rows, values(rows))
    store.close()
    assert len(clear(tmp_path)) == 1


def write_later(folder):
    time.sleep(0.2)
    write_random_rows(folder, 0, 3)


def test_a_store_removed_while_another_waits_is_made_anew(tmp_path):
    opened(tmp_path).close()
    waiting = FORK.Process(target=write_later, args=(tmp_path,))  # forked before the lock is taken, or it would have it too
    waiting.start()
    with (tmp_path / NAME / answer_store.LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(0.5)
        assert waiting.is_alive()
        for file in (tmp_path / NAME).iterdir():
            file.unlink()
        (tmp_path / NAME).rmdir()
    waiting.join(PATIENCE)
    assert waiting.exitcode == 0
    assert look(tmp_path / NAME).filled > 0


def test_a_child_process_does_not_keep_the_store_in_use(tmp_path):
    """Workers are forked from a run; one that outlives it must not hold the lock."""
    store = opened(tmp_path)
    child = FORK.Process(target=time.sleep, args=(30,))
    child.start()
    try:
        time.sleep(0.2)
        store.close()
        assert len(clear(tmp_path)) == 1
    finally:
        child.kill()
        child.join()


def test_a_store_without_marks_is_refused_and_can_be_removed(tmp_path):
    opened(tmp_path).close()
    (tmp_path / NAME / answer_store.STATES).unlink()
    for _ in range(2):  # a refusal keeps no lock
        with pytest.raises(RunError, match="states.bin is damaged or missing; `kdkit cache --clear"):
            opened(tmp_path)
    assert [one.filled for one in stores(tmp_path)] == [0]
    assert [one.path.name for one in clear(tmp_path, NAME)] == [NAME] and not stores(tmp_path)
