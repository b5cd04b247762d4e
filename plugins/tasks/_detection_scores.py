"""Scores of detection, apart from the task: torchmetrics takes long to import."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

import kdkit

from . import _boxes as boxes

PER_CENT: dict[str, Any] = {"scale": 100.0, "unit": "%"}
MATCHED = 0.5  # least IoU of a box of the student and one of the teacher that are the same
SIZES = ("small", "medium", "large")


def scores(info: kdkit.DataInfo, rule: boxes.Rule) -> Sequence[kdkit.Score]:
    """All scores read what one object computes."""
    names = info.class_names or tuple(map(str, range(info.outputs)))
    build, sees = _precision(info.outputs), _seen(rule, info.image_shape[1:])

    def score(name: str, title: str, reads: Callable[[Any], Any], **more: Any) -> kdkit.Score:
        return kdkit.Score(
            name=name, title=title, build=build, sees=sees, reads=reads, **more, **PER_CENT
        )

    over = "mean over the classes of the average precision"
    return (
        score("map", "mAP", _reader("map"), meaning=f"{over}, over IoU of 0.5 to 0.95 (COCO)"),
        score("ap_50", "AP50", _reader("map_50"), meaning=f"{over} at IoU 0.5"),
        score("ap_75", "AP75", _reader("map_75"), meaning=f"{over} at IoU 0.75"),
        score("recall", "AR", _reader("mar_100"), meaning="average recall of 100 detections"),
        score(
            "ap_by_size",
            "AP by size",
            lambda found: torch.stack([_known(found[f"map_{size}"]) for size in SIZES]),
            parts=SIZES,
            meaning="mAP of objects below 32 x 32, below 96 x 96, and above (pixels)",
        ),
        score(
            "ap",
            "AP",
            lambda found: found["of_classes"],
            parts=names,
            meaning="average precision of a class over IoU of 0.5 to 0.95",
        ),
    )


def agreement(info: kdkit.DataInfo, rule: boxes.Rule) -> Sequence[kdkit.Score]:
    """Both read what one object counts."""
    sees = _beside_teacher(rule, info.image_shape[1:])
    return (
        kdkit.Score(
            name="found",
            title="teacher's boxes found",
            build=Matches,
            sees=sees,
            reads=lambda found: found[0],
            meaning=f"share of the teacher's boxes that the student has too (IoU of {MATCHED})",
            **PER_CENT,
        ),
        kdkit.Score(
            name="iou_to_teacher",
            title="IoU to teacher",
            build=Matches,
            sees=sees,
            reads=lambda found: found[1],
            meaning="mean IoU of the boxes that both have",
            **PER_CENT,
        ),
    )


class Matches(Metric):
    """Share of the teacher's boxes that the student has too, and mean IoU of those, (2,).

    Boxes of one class are matched one to one, those of the largest IoU first. Without a box of the
    teacher the share is NaN, without a match the mean is.
    """

    teachers: Tensor
    matched: Tensor
    overlap: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("teachers", "matched", "overlap"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        for student, teacher in zip(ours, theirs, strict=True):
            overlaps = match(student, teacher)
            self.teachers += len(teacher)
            self.matched += len(overlaps)
            self.overlap += sum(overlaps)

    def compute(self) -> Tensor:
        # 0 / 0 is NaN: there is nothing to find, or nothing to compare
        return torch.stack([self.matched / self.teachers, self.overlap / self.matched])


def match(ours: Tensor, theirs: Tensor) -> list[float]:
    """Match detections (D, 6) one to one; return the IoU of each pair."""
    same = ours[:, None, boxes.CLASS] == theirs[None, :, boxes.CLASS]
    overlap = (box_iou(ours[:, boxes.BOX], theirs[:, boxes.BOX]) * same).cpu()
    found = []
    while overlap.numel() and (largest := float(overlap.max())) >= MATCHED:
        found.append(largest)
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        overlap[row], overlap[:, column] = 0, 0
    return found


class _Precision(MeanAveragePrecision):
    """COCO's figures, with those of every class in its place, NaN where it does not occur."""

    def __init__(self, classes: int) -> None:
        super().__init__(class_metrics=True, backend="faster_coco_eval")
        self.count = classes

    def compute(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super().compute()
        each = torch.full((self.count,), torch.nan)
        each[found["classes"].long().reshape(-1)] = found["map_per_class"].reshape(-1).cpu()
        return {**found, "of_classes": torch.where(each < 0, torch.nan, each)}


@functools.cache
def _precision(classes: int) -> Callable[[], Metric]:
    """One function for each number of classes: scores that share it share the object."""
    return functools.partial(_build, classes)


def _build(classes: int) -> Metric:
    try:
        return _Precision(classes)
    except ModuleNotFoundError as error:
        raise kdkit.DataError(
            "mAP needs faster-coco-eval: pip install 'kdkit[detection]'"
        ) from error


@functools.cache
def _seen(rule: boxes.Rule, size: tuple[int, int]) -> Callable[[kdkit.Rows], tuple[Any, ...]]:
    def seen(rows: kdkit.Rows) -> tuple[Any, ...]:
        found = boxes.detect(rows.answer, rule, boxes.frames(rows.target, size))
        return [_as_detections(one) for one in found], [
            _as_truth(one) for one in boxes.unpadded(rows.target)
        ]

    return seen


@functools.cache
def _beside_teacher(
    rule: boxes.Rule, size: tuple[int, int]
) -> Callable[[kdkit.Rows], tuple[Any, ...]]:
    def seen(rows: kdkit.Rows) -> tuple[Any, ...]:
        found = boxes.detect(rows.answer, rule, boxes.frames(rows.target, size))
        return found, [*boxes.unpadded(rows.teacher)]

    return seen


def _as_detections(found: Tensor) -> Mapping[str, Tensor]:
    labels = found[:, boxes.CLASS].long()
    return {"boxes": found[:, boxes.BOX], "scores": found[:, boxes.SCORE], "labels": labels}


def _as_truth(rows: Tensor) -> Mapping[str, Tensor]:
    labels, ignored = rows[:, boxes.LABEL].long(), rows[:, boxes.IGNORED].long()
    return {"boxes": rows[:, boxes.BOX], "labels": labels, "iscrowd": ignored}


def _reader(key: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda found: _known(found[key])


def _known(value: Tensor) -> Tensor:
    """NaN in place of COCO's -1: no object is of this kind."""
    return torch.where(value < 0, torch.nan, value).cpu()
