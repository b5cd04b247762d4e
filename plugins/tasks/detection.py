"""Objects in images: boxes with classes (object detection)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import kdkit

from . import _boxes as boxes


class Detection(kdkit.Task):
    """Boxes and the class of each; a row is an anchor or a point of a detector.

    Targets are boxes (M, 6) of each image: x0, y0, x1, y1 in pixels, class, and 1 if it does not
    count (COCO's crowds, VOC's difficult objects) else 0; they are transformed together with the
    image (`data.joint_augment`), and so is the frame of a picture that is padded. An answer is
    (B, A, 5 + K): of each of A anchors or points the box x0, y0, x1, y1 in pixels, the logit of its
    quality, and K logits of classes. Losses on responses see the logits of the classes as rows
    (R, K), those that read whole answers also the boxes. A row has no label of its own: which row
    answers for which object is the detector's matter, so that losses on labels read whole answers
    (`detector`).

    A detection is a row and a class with the score sigmoid(class) * sigmoid(quality) above
    `threshold`, none of whose class overlaps it with a higher score (non-maximum suppression). This
    is the score of FCOS's paper; torchvision's FCOS takes its square root, so that 0.3 here is 0.55
    there. Scores of detectors without a quality are torchvision's. Boxes are clipped to the
    picture.

    Scores: COCO's mean AP over IoU of 0.5 to 0.95 (decides), AP at 0.5 and 0.75, by size and by
    class, average recall; sizes of objects are those in the images as they are measured
    (`data.image_size`). Boxes that do not count are neither found nor missed; without a box that
    counts, a score is NaN. Agreement with a teacher, over boxes with scores of `shown` and more,
    those of one class matched by IoU of at least 0.5: share of the teacher's boxes that are found,
    mean IoU of the matched ones; NaN where there are none.
    """

    name = "detection"
    rows_are = "labels"
    labels_rows = False
    moves = True
    in_pixels = True
    default_loss = "detector"
    least_score = "shown"

    class Options(kdkit.TaskOptions):
        """Which rows of an answer are detections."""

        threshold: float = Field(
            default=0.05,
            ge=0,
            lt=1,
            description=(
                "Least score of a detection, sigmoid(class) * sigmoid(quality). Of FCOS it is the"
                " square of torchvision's score."
            ),
        )
        overlap: float = Field(
            default=0.6,
            gt=0,
            le=1,
            description="IoU above which the lower of two detections of a class is left out.",
        )
        most: int = Field(
            default=100, gt=0, le=10_000, description="Maximum number of detections in an image."
        )
        shown: float = Field(
            default=0.3,
            ge=0,
            lt=1,
            description=(
                "Least score of the boxes that are drawn, predicted (`kdkit predict`; another one"
                " by `--threshold`), compared with the teacher's, and taken for labels."
            ),
        )

    options: Options

    def check(self, info: kdkit.DataInfo) -> None:
        if info.outputs < 1:
            raise kdkit.DataError(f"says {info.outputs} classes, and detection needs at least one")

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Boxes (N, M, 6) as fp32, padded by -1."""
        try:
            found = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise kdkit.DataError(f"{whose} are no boxes: {kdkit.cause(error)}") from None
        if found.ndim != 3 or found.shape[2] != 6:
            raise kdkit.DataError(
                f"{whose} have the shape {tuple(found.shape)}; boxes are (N, M, 6): x0, y0, x1, y1,"
                " class, 1 if it does not count"
            )
        for rows in boxes.unpadded(found):
            _refuse(rows[:, boxes.BOX], rows[:, boxes.LABEL], info, whose)
        return found

    def movable(
        self, target: Any, size: tuple[int, int], info: kdkit.DataInfo
    ) -> Mapping[str, Tensor]:
        """Boxes of an image: a mapping of `boxes` (M, 4), x0, y0, x1, y1 in pixels, `labels` (M,)
        and, if some do not count, `ignored` (M,); or a tensor (M, 6), padded by -1.
        """
        from torchvision import tv_tensors

        target = _columns(target)
        try:
            corners = torch.as_tensor(target["boxes"], dtype=torch.float32).reshape(-1, 4)
            labels = torch.as_tensor(target["labels"], dtype=torch.int64)
            ignored = torch.as_tensor(target.get("ignored", [0] * len(labels)), dtype=torch.bool)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise kdkit.DataError(
                f"its target has no boxes (M, 4) with labels (M,): {kdkit.cause(error)}"
            ) from None
        if not len(corners) == len(labels) == len(ignored):
            raise kdkit.DataError(
                f"it has {len(corners)} boxes, {len(labels)} labels and {len(ignored)} `ignored`"
            )
        _refuse(corners, labels, info, "its target")
        moving = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
        edges = torch.tensor([[0.0, 0.0, size[1], size[0]]])
        frame = tv_tensors.BoundingBoxes(edges, format="XYXY", canvas_size=size)
        return {"boxes": moving, "labels": labels, "ignored": ignored, "frame": frame}

    def moved(self, target: Any) -> Tensor:
        """Boxes (M, 6) inside the image; what is less than a pixel wide or high is left out. The
        frame of the picture follows if the image is padded.
        """
        from torchvision.transforms.v2.functional import clamp_bounding_boxes

        inside = clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)
        columns = [inside, target["labels"][:, None], target["ignored"][:, None]]
        whole = torch.cat([column.to(torch.float32) for column in columns], dim=1)
        return torch.cat([whole[(inside[:, 2:] - inside[:, :2] >= 1).all(1)], _frame(target)])

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        """Two boxes an image, one of which has a class of its own by the sample's number."""
        _, height, width = info.train_shape
        whole = index.new_zeros((len(index), 2, 6), dtype=torch.float32)
        sides = torch.tensor([width, height, width, height], device=index.device)
        for place, shares in enumerate([(0.1, 0.2, 0.6, 0.8), (0.5, 0.3, 0.9, 0.7)]):
            whole[:, place, boxes.BOX] = sides * torch.tensor(shares, device=index.device)
            whole[:, place, boxes.LABEL] = ((index + place) % info.outputs).float()
        return whole

    def fits(self, shape: Sequence[int], info: kdkit.DataInfo, count: int) -> bool:
        width = boxes.CLASSES.start + info.outputs
        return len(shape) == 3 and shape[0] == count and shape[2] == width

    def of_classes(self, answer: Tensor, classes: Sequence[int]) -> Tensor:
        columns = [*range(boxes.CLASSES.start), *(boxes.CLASSES.start + k for k in classes)]
        return answer[..., columns]

    def random_answer(self, info: kdkit.DataInfo, count: int) -> kdkit.Outputs:
        anchors = 12
        _, height, width = info.train_shape
        centres = torch.rand(count, anchors, 2) * torch.tensor([width, height])
        halves = torch.rand(count, anchors, 2) * torch.tensor([width, height]) / 4 + 1
        rest = torch.randn(count, anchors, 1 + info.outputs)
        return kdkit.Outputs(torch.cat([centres - halves, centres + halves, rest], dim=2))

    def rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        """The logits of the classes (B * A, K), of answers with equally many rows."""
        boxes.refuse_other_rows([answer.logits for answer in answers])
        count = answers[0].logits.shape[1]

        def flat(answer: kdkit.Outputs) -> kdkit.Outputs:
            return kdkit.with_logits(answer, answer.logits[..., boxes.CLASSES].flatten(0, 1))

        nothing = batch.labels.new_empty(0)
        index = batch.index.repeat_interleave(count)
        return [flat(answer) for answer in answers], kdkit.Batch(nothing, nothing, index)

    def scored_rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        """Whole answers: what is detected depends on all rows of an image."""
        return [*answers], batch

    def row_width(self, info: kdkit.DataInfo) -> int:
        return info.outputs

    def combined(
        self,
        answers: Sequence[kdkit.Outputs],
        by: Literal["logits", "probabilities"] = "probabilities",
        weights: Tensor | None = None,
    ) -> kdkit.Outputs:
        """All rows of all answers; of those that overlap, the best is detected."""
        if weights is not None:
            raise kdkit.ShapeError("answers of this task have no weighted mean")
        return kdkit.Outputs(torch.cat([answer.logits for answer in answers], dim=1))

    def as_targets(self, answer: kdkit.Outputs) -> Tensor:
        """The detections with scores of `shown` and more, (B, M, 6)."""
        found = boxes.detect(answer.logits.float(), self.rule(self.options.shown))
        return boxes.as_labels(boxes.padded(found, max(1, *map(len, found))))

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        from ._detection_scores import scores

        return scores(info, self.rule())

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        from ._detection_scores import agreement

        return agreement(info, self.rule(self.options.shown))

    def remembered(self, answer: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        """The detections with scores of `shown` and more, (B, most, 6)."""
        assert isinstance(batch.inputs, Tensor)
        rule, size = self.rule(self.options.shown), batch.inputs.shape[-2:]
        found = boxes.detect(answer.logits.float(), rule, boxes.frames(batch.labels, size))
        return boxes.padded(found, self.options.most)

    def predicted(self, answer: kdkit.Outputs, info: kdkit.DataInfo) -> Sequence[Mapping[str, Any]]:
        """Class, score and box of each detection, the best first."""
        from torchvision import tv_tensors

        size = info.image_shape[1], info.image_shape[2]
        names = info.class_names or tuple(map(str, range(info.outputs)))
        told = []
        for found in boxes.detect(answer.logits.float(), self.rule(self.options.shown), size):
            corners = found[:, boxes.BOX].cpu()
            moving = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
            classes = [names[int(number)] for number in found[:, boxes.CLASS].tolist()]
            scores = found[:, boxes.SCORE].tolist()
            told.append({"class": classes, "score": scores, "box": moving})
        return told

    def drawn(self, example: kdkit.Example, info: kdkit.DataInfo) -> Any:
        """Image with true boxes, and with those of each network."""
        from ._detection_drawing import draw

        return draw(example, info, self.rule(self.options.shown))

    def rule(self, threshold: float | None = None) -> boxes.Rule:
        """Say which rows are detections, by the options, or with another threshold."""
        chosen = self.options.threshold if threshold is None else threshold
        return boxes.Rule(chosen, self.options.overlap, self.options.most)


def _columns(target: Any) -> Any:
    """Take a tensor of boxes apart; no target is no box."""
    if target is None:
        return {"boxes": [], "labels": []}
    if not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] != 6:
        return target
    (rows,) = boxes.unpadded(target[None])
    labels, ignored = rows[:, boxes.LABEL], rows[:, boxes.IGNORED]
    return {"boxes": rows[:, boxes.BOX], "labels": labels, "ignored": ignored}


def _frame(target: Mapping[str, Any]) -> Tensor:
    """Return the row of a picture's frame (1, 6), or none (0, 6) if it fills its image."""
    from torchvision.transforms.v2.functional import clamp_bounding_boxes

    frame = clamp_bounding_boxes(target["frame"])
    height, width = frame.canvas_size
    # its edges lie between pixels; resizing only rounds
    edges: Tensor = frame.as_subclass(Tensor).round()
    if edges.tolist() == [[0, 0, width, height]]:
        return edges.new_empty(0, 6)
    return torch.cat([edges, edges.new_full((1, 2), boxes.PADDING)], dim=1)


def _refuse(corners: Tensor, labels: Tensor, info: kdkit.DataInfo, whose: str) -> None:
    """Refuse boxes without an area, and classes that do not exist."""
    flat = ~(corners[:, 2:] > corners[:, :2]).all(1) | ~corners.isfinite().all(1)
    if flat.any():
        first = [f"{value:g}" for value in corners[flat][0].tolist()]
        raise kdkit.DataError(
            f"{whose}: box [{', '.join(first)}] has no area; a box is x0, y0, x1, y1 with x0 < x1"
            " and y0 < y1"
        )
    unknown = labels[(labels < 0) | (labels >= info.outputs)]
    if len(unknown):
        raise kdkit.DataError(
            f"{whose}: class {int(unknown[0])}, but classes go from 0 to {info.outputs - 1}"
        )


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [Detection]
