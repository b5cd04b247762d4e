"""One class for each pixel of an image (semantic segmentation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._segmentation import IGNORED


class Segmentation(kdkit.Task):
    """One of K classes for each pixel; a row is a pixel.

    Targets are masks (H, W) of class indices, in which 255 marks pixels that do not count; they
    are transformed together with the image (`data.joint_augment`). Answers are logits (B, K, h, w),
    brought to the masks' size by bilinear interpolation (without aligned corners) for losses and
    scores; `grid: answer` brings masks to the answers' size for losses instead. Losses on labels
    and responses see the pixels that count as rows (R, K): all, or `rows_per_image` of each image.

    Scores: mean IoU over the classes that are labelled or predicted (decides), IoU of each class,
    share of right pixels, mean over the classes of that share. Agreement with a teacher: share of
    equal pixels, mean IoU with the teacher's answer as the truth.
    """

    name = "segmentation"
    rows_are = "classes"
    moves = True
    fill = IGNORED
    default_loss = "cross_entropy"

    class Options(kdkit.TaskOptions):
        """Which pixels losses see."""

        grid: Literal["targets", "answer"] = Field(
            default="targets",
            description=(
                "Size at which losses compare: of the masks (answers are interpolated), or of the"
                " student's answer (masks take the nearest pixel). Scores are at the masks' size."
            ),
        )
        rows_per_image: int | None = Field(
            default=None,
            gt=0,
            description=(
                "Number of pixels of each image that losses see, drawn in each step among those"
                " that count (default: all). Only with a number can steps be recorded on a GPU; two"
                " processes then weigh images alike, whatever counts of them."
            ),
        )

    options: Options

    def check(self, info: kdkit.DataInfo) -> None:
        if not 2 <= info.outputs <= IGNORED:
            raise kdkit.DataError(
                f"says {info.outputs} classes: masks tell 2 to {IGNORED} of them, and {IGNORED}"
                " marks pixels that do not count"
            )

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Masks as int64 (N, H, W)."""
        try:
            found = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise kdkit.DataError(f"{whose} are no masks: {kdkit.cause(error)}") from None
        if found.ndim != 3:
            raise kdkit.DataError(
                f"{whose} have the shape {tuple(found.shape)}; masks are (N, H, W), a class index"
                " for each pixel"
            )
        return _valid(found, info, whose).to(torch.int64)

    def movable(self, target: Any, size: tuple[int, int], info: kdkit.DataInfo) -> Tensor:
        """Mask (H, W) of a PIL image of mode L or P, an array or a tensor."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2.functional import pil_to_tensor

        # no label is read of an unlabelled image, but padding marks where it ends
        target = torch.zeros(size, dtype=torch.uint8) if target is None else target
        try:
            mask = pil_to_tensor(target) if hasattr(target, "getbands") else torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise kdkit.DataError(f"its target is no mask: {kdkit.cause(error)}") from None
        mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
        if mask.ndim != 2:
            raise kdkit.DataError(
                f"its mask has the shape {tuple(mask.shape)}; a mask is (H, W), a class index for"
                " each pixel"
            )
        if mask.shape != size:
            raise kdkit.DataError(
                f"its mask is {mask.shape[0]} x {mask.shape[1]}, the image {size[0]} x {size[1]}"
            )
        movable: Tensor = tv_tensors.Mask(_valid(mask, info, "its mask"))
        return movable

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        _, height, width = info.train_shape
        places = torch.arange(height * width, device=index.device).view(height, width)
        classes = (index[:, None, None] + places) % (info.outputs + 1)
        return torch.where(classes == info.outputs, IGNORED, classes)

    def fits(self, shape: Sequence[int], info: kdkit.DataInfo, count: int) -> bool:
        return len(shape) == 4 and tuple(shape[:2]) == (count, info.outputs)

    def random_answer(self, info: kdkit.DataInfo, count: int) -> kdkit.Outputs:
        return kdkit.Outputs(torch.randn(count, info.outputs, *info.train_shape[1:]))

    def rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        """Pixels that count, of all answers at one size."""
        labels = batch.labels
        if self.options.grid == "answer":
            size = answers[0].logits.shape[2:]
            labels = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
        answered, known = _pixels(answers, labels, batch.index)
        is_known = known.labels != IGNORED
        if self.options.rows_per_image is None:
            return _selected(answered, known, is_known.nonzero()[:, 0])
        drawn = _drawn(is_known.view(len(labels), -1), self.options.rows_per_image)
        answered, known = _selected(answered, known, drawn)
        return _silenced(answered, known, is_known.any())

    def scored_rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        """All pixels, also those that do not count (255), at the masks' size."""
        return _pixels(answers, batch.labels, batch.index)

    def combined(
        self,
        answers: Sequence[kdkit.Outputs],
        by: Literal["logits", "probabilities"] = "probabilities",
        weights: Tensor | None = None,
    ) -> kdkit.Outputs:
        """At the size of the largest answer."""
        size = max((answer.logits.shape[2:] for answer in answers), key=lambda size: size.numel())
        return super().combined([_at(answer, size) for answer in answers], by, weights)

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        from ._segmentation_scores import scores

        return scores(info)

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        from ._segmentation_scores import agreement

        return agreement(info)

    def remembered(self, answer: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        """The most likely class of each pixel, uint8 (B, H, W): all logits would fill memories."""
        return _at(answer, batch.labels.shape[1:]).logits.argmax(1).to(torch.uint8)

    def predicted(self, answer: kdkit.Outputs, info: kdkit.DataInfo) -> Sequence[Mapping[str, Any]]:
        """The most likely class of each pixel of the images, as they are scored."""
        whole = _at(answer, info.image_shape[1:]).logits
        return [{"mask": mask} for mask in whole.argmax(1).to(torch.uint8)]

    def drawn(self, example: kdkit.Example, info: kdkit.DataInfo) -> Any:
        """Image, truth and answers in colours, and where the last two answers differ."""
        from ._segmentation_drawing import draw

        return draw(example, info)

    def metric_arguments(self, info: kdkit.DataInfo) -> Mapping[str, Any]:
        return {"task": "multiclass", "num_classes": info.outputs, "ignore_index": IGNORED}


def _valid(masks: Tensor, info: kdkit.DataInfo, whose: str) -> Tensor:
    """Refuse masks that are not of class indices."""
    if masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool:
        raise kdkit.DataError(f"{whose}: pixels are {masks.dtype}, and must be whole numbers")
    wrong = masks[((masks < 0) | (masks >= info.outputs)) & (masks != IGNORED)]
    if len(wrong):
        raise kdkit.DataError(
            f"{whose}: a pixel has the value {int(wrong[0])}, but classes go from 0 to"
            f" {info.outputs - 1} ({IGNORED}: does not count)"
        )
    return masks


def _at(answer: kdkit.Outputs, size: Sequence[int]) -> kdkit.Outputs:
    """Return the answer with its logits interpolated to (H, W)."""
    if answer.logits.shape[2:] == torch.Size(size):
        return answer
    logits = F.interpolate(answer.logits, tuple(size), mode="bilinear", align_corners=False)
    return kdkit.with_logits(answer, logits)


def _pixels(
    answers: Sequence[kdkit.Outputs], labels: Tensor, index: Tensor
) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
    """Turn every pixel into a row, at the size of the labels."""

    def flat(answer: kdkit.Outputs) -> kdkit.Outputs:
        logits = _at(answer, labels.shape[1:]).logits
        return kdkit.with_logits(answer, logits.permute(0, 2, 3, 1).flatten(0, 2))

    of_pixel = index[:, None].expand(-1, labels[0].numel()).flatten()
    # a feature loss reads the images; losses on rows do not
    nothing = labels.new_empty(0)
    return [flat(a) for a in answers], kdkit.Batch(nothing, labels.flatten(), of_pixel)


def _selected(
    answers: Sequence[kdkit.Outputs], batch: kdkit.Batch, places: Tensor
) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
    """Select rows (R,) of answers and batch."""
    chosen = [kdkit.with_logits(a, a.logits.index_select(0, places)) for a in answers]
    return chosen, kdkit.Batch(batch.inputs, batch.labels[places], batch.index[places])


def _drawn(is_known: Tensor, count: int) -> Tensor:
    """Draw `count` places of each image among those that count, (B, P) bool -> (B * count,).

    Without repetition as long as an image has enough of them. An image without any gets places of
    the others.
    """
    samples, pixels = is_known.shape
    count = min(count, pixels)
    keys = torch.rand(samples, pixels, device=is_known.device)
    # places that do not count come last; all shapes stay the same, so that a step can be recorded
    order = keys.masked_fill(~is_known, -1.0).topk(count, dim=1)
    first = torch.arange(samples, device=is_known.device)[:, None] * pixels
    places, sound = (order.indices + first).flatten(), (order.values >= 0).flatten()
    # instead of those that do not count, the sound ones again, in turn
    by_soundness = (~sound).to(torch.uint8).argsort(stable=True)
    turn = torch.arange(len(places), device=is_known.device) % sound.sum().clamp(min=1)
    return torch.where(sound, places, places[by_soundness[turn]])


def _silenced(
    answers: Sequence[kdkit.Outputs], batch: kdkit.Batch, counts: Tensor
) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
    """Let a batch without a single pixel that counts teach nothing: constant answers."""
    share = counts.to(torch.float32)
    constant = [kdkit.with_logits(answer, answer.logits * share) for answer in answers]
    labels = torch.where(counts, batch.labels, 0)
    return constant, kdkit.Batch(batch.inputs, labels, batch.index)


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [Segmentation]
