"""Random batches and answers of the real shapes, used while a recipe is checked."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import first_tensor, is_text, random_inputs, rows
from kdkit.contracts.missing_labels import HIDDEN_LABELS, NO_LABELS
from kdkit.contracts.records import Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Lesson
from kdkit.contracts.task import Task

PROBE = 4
"""Number of samples in a probe; a schedule may compare only half of them."""
LARGE = 2**20
"""Pixels, from which on a step with `PROBE` images takes too much memory."""


def probe_size(info: DataInfo) -> int:
    """Return the number of samples in a step with gradients."""
    return PROBE if math.prod(info.train_shape[1:]) < LARGE else PROBE // 2


def batch_of(task: Task, images: Inputs, info: DataInfo, views: int, count: int) -> Batch:
    """Make a batch of `count` images, repeating the given ones if they are too few."""
    index = torch.arange(count, device=first_tensor(images).device)
    shown = rows(images, index % len(first_tensor(images)))
    # All views are the same tensor: only shapes count here.
    labels, others = labels_of(task, index, info), (shown,) * (views - 1)
    return Batch(shown, labels, index, others, labelled_of(info, count))


def labelled_of(info: DataInfo, count: int) -> int | None:
    """Return how many of a batch's samples have labels where a recipe has unlabelled ones too."""
    return (count + 1) // 2 if info.unlabelled else None


def labels_of(task: Task, index: torch.Tensor, info: DataInfo) -> torch.Tensor:
    """Make random targets; if training samples have no labels, return an object that raises when it
    is read.
    """
    return task.random_targets(info, index) if info.labelled else NO_LABELS


def _mask(samples: int, tokens: int) -> torch.Tensor:
    """Make a mask of texts of unequal lengths, the first of them full."""
    # No text is shorter than half, so that short probes keep some tokens.
    return torch.arange(tokens) < tokens - torch.arange(samples)[:, None] % max(1, tokens // 2)


def shapes_of(lesson: Lesson) -> list[torch.Size]:
    """List the shapes of all tensors in a lesson."""
    return [value.shape for said in (lesson.student, *lesson.teachers) for value in tensors(said)]


def on_random_numbers(task: Task, lesson: Lesson, info: DataInfo) -> Lesson:
    """Replace the lesson's answers, which come from networks without weights, by normally
    distributed numbers.
    """

    def like(outputs: Outputs) -> Outputs:
        drawn = outputs.map(lambda value: torch.randn(value.shape))
        # some texts are shorter, to test whether a loss handles padding
        return (
            drawn.masked(_mask(len(tensors(drawn)[0]), shape[0]))
            if is_text(shape) and tensors(drawn)
            else drawn
        )

    shape = info.train_shape
    named = {name: like(teacher) for name, teacher in lesson.named.items()}
    changed = replace(
        lesson,
        student=like(lesson.student),
        teachers=[like(teacher) for teacher in lesson.teachers],
        named=named,
    )
    if isinstance(lesson.weights, torch.Tensor):
        changed = replace(changed, weights=torch.ones(lesson.weights.shape))
    if lesson.batch is not None:
        index = torch.arange(len(lesson.batch.index))
        # labels that a schedule may not read stay so
        known = lesson.batch.labels is not HIDDEN_LABELS
        labels = labels_of(task, index, info) if known else HIDDEN_LABELS
        inputs, labelled = random_inputs(shape, len(index)), lesson.batch.labelled
        changed = replace(changed, batch=Batch(inputs, labels, index, labelled=labelled))
    if lesson.supervised is not None:
        changed = replace(changed, supervised=on_random_numbers(task, lesson.supervised, info))
    return changed
