"""What stands for batches and answers while a recipe is checked: random ones, of the real
shapes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import first_tensor, is_text, random_inputs, rows
from kdkit.contracts.records import Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Lesson
from kdkit.data.labels import NO_LABELS


def batch_of(images: Inputs, info: DataInfo, views: int, count: int) -> Batch:
    """So many images, the same ones again where they are not enough."""
    index = torch.arange(count, device=first_tensor(images).device)
    shown = rows(images, index % len(first_tensor(images)))
    return Batch(shown, labels_of(index, info), index, (shown,) * (views - 1))


def labels_of(index: torch.Tensor, info: DataInfo) -> torch.Tensor:
    """Every class in turn; where training images have no labels, what says so when it is read."""
    return index % info.num_classes if info.labelled else NO_LABELS


def _mask(samples: int, tokens: int) -> torch.Tensor:
    """Texts of unequal lengths, the first of them full."""
    return torch.arange(tokens) < tokens - torch.arange(samples)[:, None] % max(1, tokens // 2)


def shapes_of(lesson: Lesson) -> list[torch.Size]:
    """Of all that it shows."""
    return [value.shape for said in (lesson.student, *lesson.teachers) for value in tensors(said)]


def on_random_numbers(lesson: Lesson, info: DataInfo) -> Lesson:
    """The lesson with normally distributed numbers in the place of what networks without weights
    said.
    """

    def like(outputs: Outputs) -> Outputs:
        drawn = outputs.map(lambda value: torch.randn(value.shape))
        # of texts some are shorter, so that a loss shows whether it minds
        return (
            drawn.masked(_mask(len(tensors(drawn)[0]), shape[0]))
            if is_text(shape) and tensors(drawn)
            else drawn
        )

    shape = info.image_shape
    named = {name: like(teacher) for name, teacher in lesson.named.items()}
    changed = replace(
        lesson,
        student=like(lesson.student),
        teachers=[like(teacher) for teacher in lesson.teachers],
        named=named,
    )
    if lesson.batch is not None:
        index = torch.arange(len(lesson.batch.index))
        changed = replace(
            changed, batch=Batch(random_inputs(shape, len(index)), labels_of(index, info), index)
        )
    if lesson.supervised is not None:
        changed = replace(changed, supervised=on_random_numbers(lesson.supervised, info))
    return changed
