"""Batches of images with random access: from one tensor on the device, or read one by one by worker
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdkit.contracts.dataset_source import InMemory, Split
from kdkit.contracts.records import Batch
from kdkit.data.augment import crop_flip, draw_crop_flip
from kdkit.data.transforms import MODES, Transform
from kdkit.data.workers import leave_to_parent
from kdkit.errors import DataError
from kdkit.launching import WORKER_ENDED, told_of_another
from kdkit.recipe.sections import BatchAugment

View = int | Tensor
"""The number of the augmentation: one for all images, or one for each, (B,) int64."""


@dataclass(frozen=True)
class Finish:
    """The last step of a batch, on the device: `data.augment` if a view is given, then conversion
    to floats in [0, 1].
    """

    augment: BatchAugment | None
    seed: int
    device: torch.device

    def __call__(self, pixels: Tensor, labels: Tensor, index: Tensor, view: View | None) -> Batch:
        """Finish a batch of uint8 pixels (B, C, H, W), labels (B, ...) and sample indices (B,)."""
        pixels, labels, index = (
            tensor.to(self.device, non_blocking=True) for tensor in (pixels, labels, index)
        )
        if self.augment and view is not None:
            view = view.to(self.device) if isinstance(view, Tensor) else view
            outcome = draw_crop_flip(
                self.seed, view, index, self.augment.crop_padding, self.augment.flip
            )
            pixels = crop_flip(pixels, outcome, self.augment.crop_padding)
        return Batch(pixels.to(torch.float32).div_(255), labels, index)


class Images(Protocol):
    """Some images of one part of a dataset, numbered 0 to N - 1.

    Attributes:
        labels: targets, (N, ...).
        indices: positions in the whole part, (N,); the values of `Batch.index`.
    """

    labels: Tensor
    indices: Tensor

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        """Yield one batch per tensor of image numbers, on the device; augmented for the
        corresponding view, or not at all.
        """
        ...


class HeldImages:
    """Images in one uint8 tensor on the device."""

    def __init__(self, pixels: Tensor, labels: Tensor, indices: Tensor, finish: Finish) -> None:
        self.labels, self.indices = labels, indices
        self._pixels, self._labels, self._indices = (
            tensor.to(finish.device) for tensor in (pixels, labels, indices)
        )
        self._finish = finish

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        if not plan:
            return
        numbers = torch.cat(list(plan)).to(self._pixels.device)  # one copy per epoch
        for chosen, view in zip(
            torch.split(numbers, [len(part) for part in plan]), views, strict=True
        ):
            yield self._finish(
                self._pixels.index_select(0, chosen),
                self._labels[chosen],
                self._indices[chosen],
                view,
            )


class ReadImages:
    """Images that worker processes read and transform one by one.

    Workers receive the (view, sample index) of each image, so their number changes nothing.
    """

    def __init__(
        self,
        part: Split,
        labels: Tensor,
        indices: Tensor,
        finish: Finish,
        transform: Transform,
        workers: int,
        keep_workers: bool,
    ) -> None:
        self.labels, self.indices = labels[indices], indices
        self._finish = finish
        self._reader = _Reader(part, transform)
        self._workers = workers
        self._keep_workers = keep_workers and workers > 0
        self._keys = _Keys()
        self._kept: DataLoader[Any] | None = None
        self._in_use = False

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        pairs = zip(plan, views, strict=True)
        keys = [
            list(zip(_each(view, len(numbers)), self.indices[numbers].tolist(), strict=True))
            for numbers, view in pairs
        ]
        for numbers, view, pixels in zip(plan, views, self._read(keys), strict=True):
            yield self._finish(pixels, self.labels[numbers], self.indices[numbers], view)

    def _read(self, keys: list[list[tuple[int, int]]]) -> Iterator[Tensor]:
        if not self._keep_workers or self._in_use:  # kept workers serve one epoch at a time
            yield from map(intact, loaded(self._loader(_Keys(keys), keep=False)))
            return
        self._kept = self._kept or self._loader(self._keys, keep=True)
        self._keys.batches, self._in_use = keys, True
        try:
            yield from map(intact, loaded(self._kept))
        except DataError:
            self._kept = None  # ends the workers now, not when the traceback is collected
            raise
        finally:
            self._in_use = False

    def _loader(self, keys: _Keys, keep: bool) -> DataLoader[Any]:
        return DataLoader(
            self._reader,
            batch_sampler=keys,
            num_workers=self._workers,
            collate_fn=stack,
            pin_memory=self._finish.device.type == "cuda",
            persistent_workers=keep,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # otherwise it draws from the global generator
        )


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield what the processes of a loader read.

    Raises:
        DataError: one of them has ended.
    """
    try:
        yield from loader
    except (EOFError, ConnectionError):  # raised when torch fetches a tensor from a dead worker
        raise DataError(WORKER_ENDED) from None
    except RuntimeError as error:
        if told_of_another(error) == WORKER_ENDED:
            raise DataError(WORKER_ENDED) from None
        raise


def _each(view: View | None, count: int) -> list[int]:
    """Return the view of each of `count` images."""
    return (
        [int(number) for number in view.tolist()]
        if isinstance(view, Tensor)
        else [view or 0] * count
    )


class _Keys:
    """A batch sampler whose batches are set from outside."""

    def __init__(self, batches: list[list[tuple[int, int]]] | None = None) -> None:
        self.batches = batches or []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Broken:
    """A worker's replacement for an image that it could not read; an exception would arrive as a
    page of traceback.
    """

    message: str


class _Reader(Dataset[Any]):
    def __init__(self, part: Split, transform: Transform) -> None:
        self.part, self.transform = part, transform

    def __getitem__(self, key: tuple[int, int]) -> Tensor | Broken:
        view, index = key
        try:
            image = self.part[index][0]
        except DataError as error:
            return Broken(str(error))
        except Exception as error:
            return Broken(f"image {index} cannot be read: {type(error).__name__}: {error}")
        try:
            return self.transform(image, view, index)
        except DataError as error:
            return Broken(f"image {index}: {error}")


def stack(samples: list[Tensor | Broken]) -> Tensor | Broken:
    """Stack images to uint8 (B, C, H, W), or return the first broken one."""
    tensors = [sample for sample in samples if isinstance(sample, Tensor)]
    if len(tensors) == len(samples):
        return torch.stack(tensors)
    return next(sample for sample in samples if isinstance(sample, Broken))


def intact(pixels: Tensor | Broken) -> Tensor:
    """Return the pixels.

    Raises:
        DataError: an image could not be read.
    """
    if isinstance(pixels, Broken):
        raise DataError(pixels.message)
    return pixels


class Pictures:
    """Images held as one tensor, returned as PIL images."""

    def __init__(self, part: InMemory) -> None:
        if part.images.shape[1] not in MODES:
            raise DataError(
                "data.timm_augment takes images of 1 or 3 channels, these have"
                f" {part.images.shape[1]}"
            )
        self.part = part
        self.labels: list[int] = part.labels.tolist()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.transforms.functional import to_pil_image

        return to_pil_image(self.part.images[index]), self.labels[index]
