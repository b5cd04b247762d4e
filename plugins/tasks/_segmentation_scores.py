"""Scores of segmentation, apart from the task: torchmetrics takes long to import."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

import kdkit

from ._segmentation import IGNORED

PER_CENT: dict[str, Any] = {"scale": 100.0, "unit": "%"}


def scores(info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
    """All scores read one confusion matrix (K, K), true classes by predicted ones."""
    build = _confusion_matrix(info.outputs)
    return (
        kdkit.Score(
            name="mean_iou",
            title="mean IoU",
            build=build,
            reads=mean_iou,
            meaning=(
                "mean over the classes, labelled or predicted, of intersection over union of their"
                " pixels"
            ),
            **PER_CENT,
        ),
        kdkit.Score(
            name="pixel_accuracy",
            title="pixel acc.",
            build=build,
            reads=lambda counts: counts.diagonal().sum() / counts.sum(),
            meaning="share of pixels whose most likely class is right",
            **PER_CENT,
        ),
        kdkit.Score(
            name="class_accuracy",
            title="class acc.",
            build=build,
            reads=lambda counts: (counts.diagonal() / counts.sum(1)).nanmean(),
            meaning="mean over the classes in the data of the share of their pixels that is found",
            **PER_CENT,
        ),
        kdkit.Score(
            name="iou",
            title="IoU",
            build=build,
            reads=iou,
            parts=info.class_names or tuple(map(str, range(info.outputs))),
            meaning="intersection over union of the pixels of a class",
            **PER_CENT,
        ),
    )


def agreement(info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
    """Both read one confusion matrix, the teacher's classes by the student's."""
    build = _confusion_matrix(info.outputs)
    return (
        kdkit.Score(
            name="agreement",
            title="agreement",
            build=build,
            sees=beside_teacher,
            reads=lambda counts: counts.diagonal().sum() / counts.sum(),
            meaning="share of pixels whose most likely class is the teacher's too",
            **PER_CENT,
        ),
        kdkit.Score(
            name="iou_to_teacher",
            title="mean IoU to teacher",
            build=build,
            sees=beside_teacher,
            reads=lambda counts: iou(counts).nanmean(),
            meaning="mean IoU with the teacher's answer as the truth",
            **PER_CENT,
        ),
    )


def mean_iou(counts: Tensor) -> Tensor:
    """Mean of the classes that occur, from a confusion matrix.

    Raises:
        DataError: no pixel was counted.
    """
    if not counts.any():
        raise kdkit.DataError(f"no pixel of the images to measure on counts: all are {IGNORED}")
    return iou(counts).nanmean()


def iou(counts: Tensor) -> Tensor:
    """Intersection over union (K,) from a confusion matrix; NaN for a class that does not occur."""
    intersection = counts.diagonal()
    return intersection / (counts.sum(0) + counts.sum(1) - intersection)


def beside_teacher(rows: kdkit.Rows) -> tuple[Tensor, Tensor]:
    """The student's answer beside the teacher's classes, where pixels count."""
    theirs = rows.teacher.flatten().long()
    return rows.answer, torch.where(rows.target == IGNORED, IGNORED, theirs)


@functools.cache
def _confusion_matrix(classes: int) -> Any:
    """One function for each number of classes: scores that share it share the counts."""
    return functools.partial(
        # the checks of values would make the host wait for the device
        _Counts,
        classes,
        ignore_index=IGNORED,
        validate_args=False,
    )


class _Counts(MulticlassConfusionMatrix):
    """Confusion matrix in double precision, which holds pixels without rounding."""

    def compute(self) -> Tensor:
        counts: Tensor = super().compute()
        return counts.double()
