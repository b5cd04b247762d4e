"""Boxes with classes: the forms of targets and answers of detection, and what is detected.

A target is (M, 6): x0, y0, x1, y1 in pixels of the image, class, 1 if the box does not count (a
crowd, or an object too difficult to tell) else 0; rows of -1 pad it. Where an image is padded, one
row more is the frame of its picture: x0, y0, x1, y1, -1, -1. An answer is (A, 5 + K), a row for
each anchor or point: x0, y0, x1, y1, logit of the box's quality, K logits of the classes.
Detections are (D, 6): x0, y0, x1, y1, score, class, the best first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kdkit

BOX = slice(0, 4)
QUALITY = 4
CLASSES = slice(5, None)
SCORE = 4
CLASS = 5
LABEL = 4
IGNORED = 5
PADDING = -1


@dataclass(frozen=True)
class Rule:
    """How detections are chosen among the rows of an answer.

    Attributes:
        threshold: least score.
        overlap: IoU above which the lower of two boxes of a class is left out.
        most: maximum number of detections in an image.
        candidates: maximum number of pairs of a box and a class that are compared by overlap.
    """

    threshold: float
    overlap: float
    most: int
    candidates: int = 1000


def refuse_other_rows(answers: Sequence[Tensor]) -> None:
    """Refuse answers (B, A, 5 + K) whose rows are not those of the first one.

    Raises:
        ShapeError: the numbers of rows differ.
    """
    counts = [answer.shape[1] for answer in answers]
    if len(set(counts)) > 1:
        raise kdkit.ShapeError(
            f"the detectors' rows do not agree: {counts[0]:,} anchors or points in an image, and"
            f" {next(c for c in counts if c != counts[0]):,}; compare features, or take the"
            " teacher's boxes for labels (`pseudo_labels`)"
        )


def refuse_other_classes(student: Tensor, teacher: Tensor) -> None:
    """Refuse a teacher's answer of another form than the student's (B, A, 5 + K).

    Raises:
        ShapeError: it has other classes, or one of them is no answer of a detector.
    """
    if any(z.ndim != 3 or z.shape[2] <= CLASSES.start for z in (student, teacher)) or (
        student.shape[2] != teacher.shape[2]
    ):
        raise kdkit.ShapeError(
            f"student answer {tuple(student.shape)} and teacher answer {tuple(teacher.shape)} must"
            " both be (B, A, 5 + K) over the same K classes"
        )


def scores_of(answer: Tensor) -> Tensor:
    """Scores (..., K) of the classes: sigmoid(class) * sigmoid(quality), as in FCOS's paper.

    torchvision's FCOS gives the square root: 0.3 here is 0.55 there. Other detectors know no
    quality (its logit is a constant, sigmoid 1), and their scores are torchvision's.
    """
    return answer[..., CLASSES].sigmoid() * answer[..., QUALITY : QUALITY + 1].sigmoid()


def detect(
    answer: Tensor, rule: Rule, within: Sequence[int] | Tensor | None = None
) -> list[Tensor]:
    """Choose the detections (D, 6) of each image among all rows (B, A, 5 + K).

    Args:
        answer: of a detector.
        rule: which rows are detections.
        within: what boxes are clipped to: the size (H, W) of the images, or the frames (B, 4) of
            the pictures in them.
    """
    from torchvision.ops import batched_nms

    limits = whole(answer, within) if isinstance(within, Sequence) else within
    scores = scores_of(answer).flatten(1)
    best = scores.topk(min(rule.candidates, scores.shape[1]))
    classes = answer.shape[2] - CLASSES.start
    found = []
    for number, (value, place) in enumerate(zip(best.values, best.indices, strict=True)):
        is_sure = value > rule.threshold
        value, place = value[is_sure], place[is_sure]
        boxes, labels = answer[number, place // classes, BOX], place % classes
        if limits is not None:
            boxes = clipped(boxes, limits[number])
        kept = batched_nms(boxes, value, labels, rule.overlap)[: rule.most]
        pairs = boxes[kept], value[kept, None], labels[kept, None].to(boxes)
        found.append(torch.cat(pairs, dim=1))
    return found


def whole(images: Tensor, size: Sequence[int]) -> Tensor:
    """Frames (B, 4) of images (B, ...) of that size (H, W) that are all picture."""
    return images.new_tensor([0, 0, size[1], size[0]]).expand(len(images), 4)


def frames(targets: Tensor, size: Sequence[int]) -> Tensor:
    """Find the frames (B, 4) of the pictures in padded images: x0, y0, x1, y1 in pixels.

    Args:
        targets: of the images, (B, M, 6).
        size: (H, W) of the images; the frame of one without padding.
    """
    last = targets.new_full((len(targets), 1, 6), PADDING)
    last[:, 0, BOX] = whole(targets, size)
    rows = torch.cat([targets, last], dim=1)
    is_frame = (rows[..., LABEL] < 0) & (rows[..., 2] > rows[..., 0])
    first = is_frame.int().argmax(1)
    return rows[torch.arange(len(rows), device=rows.device), first, BOX]


def clipped(boxes: Tensor, frame: Tensor) -> Tensor:
    """Clip boxes (D, 4) to a frame (4,)."""
    return boxes.maximum(frame[[0, 1, 0, 1]]).minimum(frame[[2, 3, 2, 3]])


def padded(found: Sequence[Tensor], most: int) -> Tensor:
    """Stack detections (D, 6) of several images to (B, most, 6), padded by -1."""
    whole = found[0].new_full((len(found), most, found[0].shape[1]), PADDING)
    for rows, one in zip(whole, found, strict=True):
        rows[: len(one)] = one
    return whole


def unpadded(boxes: Tensor) -> Iterator[Tensor]:
    """Yield the rows of each image that are no padding, of targets or detections (B, M, 6)."""
    for rows in boxes:
        # neither a class nor a score is negative
        yield rows[rows[:, LABEL] >= 0]


def counted(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Put an empty row before targets (B, M, 6), as there is no maximum over no boxes, and tell
    which rows are boxes that count, (B, 1 + M).

    Raises:
        ShapeError: they are no boxes.
    """
    if targets.ndim != 3 or targets.shape[2] != 6:
        raise kdkit.ShapeError(f"targets {tuple(targets.shape)} are no boxes (B, M, 6)")
    empty = targets.new_full((len(targets), 1, 6), PADDING)
    targets = torch.cat([empty, targets], dim=1)
    return targets, (targets[..., LABEL] >= 0) & (targets[..., IGNORED] == 0)


def as_labels(found: Tensor) -> Tensor:
    """Take detections (..., 6) for targets: their classes are certain, and all count."""
    boxes, labels = found[..., BOX], found[..., CLASS : CLASS + 1]
    is_none = labels == PADDING
    return torch.cat([boxes, labels, torch.where(is_none, labels, torch.zeros_like(labels))], -1)
