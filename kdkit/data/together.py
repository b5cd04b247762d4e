"""Transforms that move an image and its target together: torchvision's v2 on `tv_tensors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.task import Task
from kdkit.data.augment import sample_seed
from kdkit.data.transforms import seeded, with_channels
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec, JointAugment, Size

Target = Tensor | Mapping[str, Tensor]
"""What moves with an image: one tensor of torchvision's `tv_tensors`, or several by name."""


class Together:
    """Resizes and augments an image and its target, drawn only from (seed, view, sample index).

    Args:
        spec: the recipe's `data` section.
        task: whose targets move.
        info: of the data; its shape is that of measured images.
        seed: of the augmentation.
        augment: of training images; None for images that are measured.
    """

    def __init__(
        self, spec: DataSpec, task: Task, info: DataInfo, seed: int, augment: JointAugment | None
    ) -> None:
        self.size, self.interpolation = spec.size, spec.interpolation
        self.task, self.info = task, info
        self.seed = seed
        shape = info.train_shape if augment else info.image_shape
        self.shape = (shape[1], shape[2])
        self.augmented = (
            _augmentation(augment, self.shape, task.fill, spec.interpolation) if augment else None
        )

    def __call__(self, sample: tuple[Any, Any], view: int, index: int) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = with_channels(sample[0], self.info.image_shape[0])
        pixels = tv_tensors.Image(pil_to_tensor(image))
        height, width = pixels.shape[-2:]
        moved = pixels, self.task.movable(sample[1], (height, width), self.info)
        if self.size is not None:
            moved = fitted(*moved, self.size, self.interpolation, self.task.fill)
        if self.augmented is not None:
            with seeded(sample_seed(self.seed, view, index)):
                moved = self.augmented(*moved)
        height, width = moved[0].shape[-2:]
        if (height, width) != self.shape:
            raise DataError(
                f"is {height} x {width}, others {self.shape[0]} x {self.shape[1]}: set"
                " data.image_size"
            )
        return moved[0].as_subclass(Tensor), self.task.moved(moved[1])


def fitted(
    pixels: Tensor, target: Target, size: Size, interpolation: str, fill: int
) -> tuple[Tensor, Target]:
    """Scale an image and its target to fit in (H, W), and pad both on all sides to that size."""
    from torchvision.transforms import v2

    if tuple(pixels.shape[-2:]) == size:
        return pixels, target
    inside, before = placed(pixels.shape[-2:], size)
    after = size[0] - inside[0] - before[0], size[1] - inside[1] - before[1]
    pad = v2.Pad([before[1], before[0], after[1], after[0]], fill=_fills(fill))
    both: tuple[Tensor, Target] = pad(*_resized(pixels, target, inside, interpolation))
    return both


def _resized(
    pixels: Tensor, target: Target, size: Sequence[int], interpolation: str
) -> tuple[Tensor, Target]:
    """Resize an image and its target to (H, W)."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as v2

    mode = InterpolationMode(interpolation)
    image = v2.resize(pixels, list(size), interpolation=mode, antialias=True)
    if isinstance(target, Tensor):
        return image, _resized_target(target, size)
    return image, {name: _resized_target(value, size) for name, value in target.items()}


def _resized_target(target: Tensor, size: Sequence[int]) -> Tensor:
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as v2

    # `resize` takes the nearest pixel by its corner, which shifts a mask against its image
    if isinstance(target, tv_tensors.Mask):
        nearest: Tensor = tv_tensors.wrap(_nearest(target, size), like=target)
        return nearest
    # it takes a plain tensor for an image
    if not isinstance(target, tv_tensors.TVTensor):
        return target
    moved: Tensor = v2.resize(target, list(size))
    return moved


def _nearest(picture: Tensor, size: Sequence[int]) -> Tensor:
    """Resize classes (h, w) to (H, W): of each pixel, the one whose centre is nearest."""
    whole = F.interpolate(picture[None, None].float(), tuple(size), mode="nearest-exact")
    return whole[0, 0].to(picture.dtype)


def placed(own: Sequence[int], size: Size) -> tuple[list[int], tuple[int, int]]:
    """Return the size of an image of size `own` (H, W) inside a batch's, and where it begins."""
    scale = min(size[0] / own[0], size[1] / own[1])
    inside = [max(1, round(own[0] * scale)), max(1, round(own[1] * scale))]
    return inside, ((size[0] - inside[0]) // 2, (size[1] - inside[1]) // 2)


def unfitted(picture: Tensor, own: Sequence[int], size: Size | None) -> Tensor:
    """Undo `fitted` for a picture of classes: (h, w) of any scale, to an image's own (H, W)."""
    if size is not None:
        (height, width), (top, left) = placed(own, size)
        picture = _nearest(picture, size)[top : top + height, left : left + width]
    return _nearest(picture, own)


def unfitted_boxes(boxes: Tensor, own: Sequence[int], size: Size) -> Tensor:
    """Undo `fitted` for boxes (M, 4), x0, y0, x1, y1, in an image's own (H, W)."""
    (height, width), (top, left) = placed(own, size)
    shift = boxes.new_tensor([left, top, left, top])
    scale = boxes.new_tensor([own[1] / width, own[0] / height] * 2)
    limits = boxes.new_tensor([own[1], own[0]] * 2)
    moved = (boxes.as_subclass(Tensor) - shift) * scale
    return moved.clamp(min=0).minimum(limits)


def _augmentation(augment: JointAugment, crop: Size, fill: int, interpolation: str) -> Any:
    from torchvision.transforms import v2

    jitter = [augment.color_jitter] * 3
    steps = [
        *([_Scaled(augment.scale, interpolation)] if augment.scale else []),
        v2.RandomCrop(crop, pad_if_needed=True, fill=_fills(fill)),
        v2.RandomHorizontalFlip(augment.flip),
        *([v2.ColorJitter(*jitter)] if augment.color_jitter else []),
    ]
    return v2.Compose(steps)


class _Scaled:
    """Resizes image and target by a random factor."""

    def __init__(self, scale: tuple[float, float], interpolation: str) -> None:
        self.scale, self.interpolation = scale, interpolation

    def __call__(self, pixels: Tensor, target: Target) -> tuple[Tensor, Target]:
        factor = float(torch.empty(()).uniform_(*self.scale))
        size = [max(1, round(side * factor)) for side in pixels.shape[-2:]]
        return _resized(pixels, target, size, self.interpolation)


def _fills(fill: int) -> dict[Any, int]:
    """Fill padded pixels of images with black, those of masks with the task's value."""
    from torchvision import tv_tensors

    return {tv_tensors.Image: 0, tv_tensors.Mask: fill}
