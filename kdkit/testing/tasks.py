"""The promises that every task keeps, as one function that checks them."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.task import Rows, Score, Task
from kdkit.engine.evaluate import Tally
from kdkit.errors import DataError

# Not a multiple of 7, so that one of the batch sizes tried leaves a smaller last batch.
SAMPLES = 24
IMAGES = DataInfo((3, 8, 8), outputs=5, num_train=SAMPLES, num_test=SAMPLES)
TEXTS = DataInfo((7,), outputs=5, num_train=SAMPLES, num_test=SAMPLES, num_tokens=9)


def check_task(task: Task, info: DataInfo | None = None) -> None:
    """Check what every task promises, on random answers.

    Args:
        task: with its options.
        info: of a dataset that it takes (default: one of small images, or texts, with five
            outputs, or one).

    Raises:
        AssertionError: says which promise is broken.
    """
    info = info or _taken(task)
    task.check(info)
    info = task.described(info)
    torch.manual_seed(0)
    batch = _batch(task, info)
    answer, teacher = (task.random_answer(info, SAMPLES) for _ in range(2))
    assert task.fits(answer.logits.shape, info, SAMPLES), (
        f"{task.name}: `fits` refuses the shape {tuple(answer.logits.shape)} of `random_answer`"
    )
    _check_targets(task, info, batch.labels)
    if task.moves:
        _check_movable(task, info, batch.labels)
    _check_rows(task, answer, batch)
    _check_teacher(task, info, teacher, batch)
    _check_scores(task, info, answer, teacher, batch)


def _taken(task: Task) -> DataInfo:
    """Find a dataset that the task takes: one with five outputs, or with one."""
    usual = TEXTS if task.takes == "texts" else IMAGES
    try:
        task.check(usual)
    except DataError:
        return replace(usual, outputs=1)
    return usual


def _batch(task: Task, info: DataInfo) -> Batch:
    index = torch.arange(SAMPLES)
    inputs = task.random_inputs(info.image_shape, SAMPLES)
    return Batch(inputs, task.random_targets(info, index), index)


def _check_targets(task: Task, info: DataInfo, targets: Tensor) -> None:
    """Check that random targets are valid, and that invalid ones are refused by a DataError of one
    line.
    """
    assert len(targets) == SAMPLES, f"{task.name}: `random_targets` gives {len(targets)} targets"
    again = task.targets(targets, info, "targets")
    assert torch.equal(again, targets), f"{task.name}: `targets` changes sound targets"
    groups = task.strata(targets)
    assert groups is None or (len(groups) == SAMPLES and int(groups.min()) >= 0), (
        f"{task.name}: `strata` gives no group from 0 on for each sample"
    )
    # What a broken dataset gives: words for numbers, or nothing.
    for wrong in (["a"] * SAMPLES, [None] * SAMPLES):
        try:
            task.targets(wrong, info, "targets")
        except DataError as error:
            assert "\n" not in str(error), f"{task.name}: `targets` refuses in several lines"
        else:
            raise AssertionError(f"{task.name}: `targets` takes {wrong[0]!r} for a target")


def _check_movable(task: Task, info: DataInfo, targets: Tensor) -> None:
    """Check that a target becomes tensors that transforms move, and a valid target again; that an
    unlabelled image has one too; and that what is no target is refused by a DataError of one line.
    """
    from torchvision.tv_tensors import TVTensor

    _, height, width = info.train_shape
    size = (height, width)
    movable = task.movable(targets[0], size, info)
    parts = [movable] if isinstance(movable, Tensor) else [*movable.values()]
    assert any(isinstance(part, TVTensor) for part in parts), (
        f"{task.name}: `movable` gives no tv_tensor"
    )
    task.targets(task.moved(movable)[None], info, "the moved target")
    task.moved(task.movable(None, size, info))
    try:
        task.movable("a", size, info)
    except DataError as error:
        assert "\n" not in str(error), f"{task.name}: `movable` refuses in several lines"
    else:
        raise AssertionError(f"{task.name}: `movable` takes a word for a target")


def _check_rows(task: Task, answer: Outputs, batch: Batch) -> None:
    """Check that an answer has as many rows as its targets and samples."""
    (rows,), asked = task.rows([answer], batch)
    counts = {len(rows.logits), len(asked.index)}
    counts |= {len(asked.labels)} if task.labels_rows else set()
    assert len(counts) == 1, f"{task.name}: `rows` gives {sorted(counts)} rows"
    assert set(asked.index.tolist()) <= set(batch.index.tolist()), (
        f"{task.name}: `rows` names samples that are not in the batch"
    )


def _check_teacher(task: Task, info: DataInfo, teacher: Outputs, batch: Batch) -> None:
    """Check that a teacher's answer is remembered sample by sample, can be a target, and is the
    mean of itself.
    """
    assert len(task.remembered(teacher, batch)) == SAMPLES, (
        f"{task.name}: `remembered` has no entry for each sample"
    )
    task.targets(task.as_targets(teacher), info, "the teacher's answers")
    twice = task.combined([teacher, teacher])
    first, second = task.as_targets(teacher), task.as_targets(twice)
    assert torch.allclose(first, second), f"{task.name}: `combined` of one answer twice is another"


def _check_scores(
    task: Task, info: DataInfo, answer: Outputs, teacher: Outputs, batch: Batch
) -> None:
    """Check that scores have names, and are the same for any batch size."""
    scores, agreement = task.scores(info), task.agreement(info)
    names = [score.name for score in (*scores, *agreement)]
    assert scores, f"{task.name}: `scores` is empty, so that nothing decides"
    assert len(set(names)) == len(names), f"{task.name}: two scores have one name: {names}"
    for score in (*scores, *agreement):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", score.name), f"{score.name}: no snake_case"
        assert score.meaning, f"{score.name}: has no `meaning`"
    whole = _values(task, [*scores, *agreement], answer, teacher, batch, SAMPLES)
    for size in (1, 7):
        parts = _values(task, [*scores, *agreement], answer, teacher, batch, size)
        for name, value in whole.items():
            # Sums over other batches round otherwise in fp32.
            assert math.isclose(parts[name], value, rel_tol=1e-4, abs_tol=1e-5), (
                f"{task.name}: {name} is {value:.6g} at once and {parts[name]:.6g} in batches of"
                f" {size}"
            )


def _values(
    task: Task, scores: list[Score], answer: Outputs, teacher: Outputs, batch: Batch, size: int
) -> dict[str, float]:
    # Not over the processes of a launch: each has the same answers here.
    tally = Tally(scores, together=False)
    remembered = task.remembered(teacher, batch)
    for part in torch.split(torch.arange(SAMPLES), size):
        some = batch.map(lambda value, part=part: value[part])  # type: ignore[misc]
        (rows,), asked = task.scored_rows([answer.map(lambda v, part=part: v[part])], some)  # type: ignore[misc]
        known = (
            remembered[part]
            if isinstance(remembered, Tensor)
            else [remembered[place] for place in part.tolist()]
        )
        tally.add(Rows(rows.logits, asked.labels, known))
    return tally.values()
