"""Batches of images with random access: held on the device, or read by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from kdkit.contracts.dataset_source import InMemory, Pairs
from kdkit.contracts.records import Batch
from kdkit.data.augment import crop_flip, draw_crop_flip
from kdkit.data.transforms import MODES, Transform
from kdkit.data.workers import leave_to_parent
from kdkit.errors import DataError
from kdkit.launching import WORKER_ENDED, told_of_another, worker_ended
from kdkit.recipe.data_section import BatchAugment

View = int | Tensor
"""The number of the augmentation: one for all images, or one for each, (B,) int64."""


DRAWN_TOGETHER = 64  # batches
PADDING = -1  # ends the targets of a sample that has fewer than others, such as boxes

Moved = Tensor | tuple[Tensor, Tensor]
"""Transformed images (uint8); with their targets, if those move with the images."""


@dataclass(frozen=True)
class Finish:
    """The last step of a batch, on the device: `data.augment`, then floats in [0, 1]."""

    augment: BatchAugment | None
    seed: int
    device: torch.device

    def __call__(self, pixels: Tensor, labels: Tensor, index: Tensor, view: View | None) -> Batch:
        """Finish a batch of uint8 pixels (B, C, H, W), labels (B, ...) and sample indices (B,)."""
        # before the conversion: uint8 is a quarter of the bytes to copy
        pixels, labels, index = (
            tensor.to(self.device, non_blocking=True) for tensor in (pixels, labels, index)
        )
        return self.as_drawn(pixels, labels, index, self.drawn(index, view))

    def drawn(self, index: Tensor, view: View | None) -> Tensor | None:
        """Draw the augmentation of samples by their indices (B,); None if there is none."""
        if not self.augment or view is None:
            return None
        view = view.to(self.device) if isinstance(view, Tensor) else view
        return draw_crop_flip(self.seed, view, index, self.augment.crop_padding, self.augment.flip)

    def as_drawn(
        self, pixels: Tensor, labels: Tensor, index: Tensor, outcome: Tensor | None
    ) -> Batch:
        """Finish a batch on the device whose augmentation (B,) is drawn."""
        if self.augment and outcome is not None:
            pixels = crop_flip(pixels, outcome, self.augment.crop_padding)
        # masks are read as bytes; torch's losses take class indices as int64 only
        labels = labels if labels.is_floating_point() else labels.to(torch.int64)
        return Batch(pixels.to(torch.float32).div_(255), labels, index)


class Images(Protocol):
    """Some images of one part of a dataset, numbered 0 to N - 1.

    Attributes:
        labels: targets, (N, ...); empty if they are read with the images.
        indices: positions in the whole part, (N,); the values of `Batch.index`.
    """

    labels: Tensor
    indices: Tensor

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        """Yield a batch per tensor of image numbers, on the device; augmented if it has a view."""
        ...


class HeldImages:
    """Images in one uint8 tensor on the device."""

    def __init__(self, pixels: Tensor, labels: Tensor, indices: Tensor, finish: Finish) -> None:
        # on the host, for what draws and counts; the copies on the device are for batches
        self.labels, self.indices = labels, indices
        self._pixels, self._labels, self._indices = (
            tensor.to(finish.device) for tensor in (pixels, labels, indices)
        )
        self._finish = finish

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        # in groups: drawn batch by batch, the augmentation would be many small kernels a step
        for first in range(0, len(plan), DRAWN_TOGETHER):
            group = slice(first, first + DRAWN_TOGETHER)
            yield from self._group(plan[group], views[group])

    def _group(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        sizes = [len(numbers) for numbers in plan]
        numbers = torch.cat(list(plan)).to(self._pixels.device)
        index = self._indices[numbers]
        drawn = self._finish.drawn(index, _of_group(views, sizes))
        outcomes = [None] * len(plan) if drawn is None else torch.split(drawn, sizes)
        rows = zip(
            torch.split(numbers, sizes),
            torch.split(self._labels[numbers], sizes),
            torch.split(index, sizes),
            outcomes,
            strict=True,
        )
        for chosen, labels, places, outcome in rows:
            pixels = self._pixels.index_select(0, chosen)
            yield self._finish.as_drawn(pixels, labels, places, outcome)


def _of_group(views: Sequence[View | None], sizes: Sequence[int]) -> View | None:
    """Return the view of all images of some batches: one for all, or one for each."""
    first = views[0]
    if not isinstance(first, Tensor) and all(view == first for view in views):
        return first
    each = [torch.as_tensor(view).expand(size) for view, size in zip(views, sizes, strict=True)]
    return torch.cat(each)


class ReadImages:
    """Images that worker processes read and transform one by one; targets that move with them,
    too.

    Workers receive the (view, sample index) of each image, so their number changes nothing.
    """

    def __init__(
        self,
        part: Pairs,
        labels: Tensor | None,
        indices: Tensor,
        finish: Finish,
        transform: Transform,
        workers: int,
        keep_workers: bool,
    ) -> None:
        self.labels = torch.empty(0, dtype=torch.int64) if labels is None else labels[indices]
        self.indices = indices
        self._finish = finish
        # what workers get, without the labels and the device of this object
        self._reader = _Reader(part, transform)
        self._workers = workers
        # torch refuses persistent workers if there are none
        self._keep_workers = keep_workers and workers > 0
        self._keys = _Keys()
        self._kept: DataLoader[Any] | None = None
        self._in_use = False

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        keys = [
            list(zip(_each(view, len(numbers)), self.indices[numbers].tolist(), strict=True))
            for numbers, view in zip(plan, views, strict=True)
        ]
        for numbers, view, read in zip(plan, views, self._read(keys), strict=True):
            pixels, labels = (read, self.labels[numbers]) if isinstance(read, Tensor) else read
            yield self._finish(pixels, labels, self.indices[numbers], view)

    def _read(self, keys: list[list[tuple[int, int]]]) -> Iterator[Moved]:
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
            # only pinned memory is copied without a wait (`non_blocking` above)
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
        raise DataError(worker_ended()) from None
    except RuntimeError as error:
        if told_of_another(error) == WORKER_ENDED:
            raise DataError(WORKER_ENDED) from None
        raise


def _each(view: View | None, count: int) -> list[int]:
    """Return the view of each of `count` images."""
    return view.tolist() if isinstance(view, Tensor) else [view or 0] * count


class _Keys:
    """A batch sampler whose batches are set from outside.

    A DataLoader with persistent workers asks the same sampler in every epoch.
    """

    def __init__(self, batches: list[list[tuple[int, int]]] | None = None) -> None:
        self.batches = batches or []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Broken:
    """An unreadable image: an exception in a worker would arrive as a page of traceback."""

    message: str


class _Reader(Dataset[Any]):
    def __init__(self, part: Pairs, transform: Transform) -> None:
        self.part, self.transform = part, transform

    def __getitem__(self, key: tuple[int, int]) -> Moved | Broken:
        view, index = key
        try:
            sample = self.part[index]
        except DataError as error:
            return Broken(str(error))
        except Exception as error:
            return Broken(f"image {index} cannot be read: {type(error).__name__}: {error}")
        try:
            return self.transform(sample, view, index)
        except DataError as error:
            return Broken(f"{called(self.part, index)}: {error}")


def called(part: Any, index: int) -> str:
    """Name an image in a message: by its file, or else its number."""
    paths = getattr(part, "paths", ())
    return str(paths[index]) if index < len(paths) else f"image {index}"


def stack(samples: list[Moved | Broken]) -> Moved | Broken:
    """Stack images to uint8 (B, C, H, W), with their targets if they have any; or return the first
    broken one.
    """
    if broken := [sample for sample in samples if isinstance(sample, Broken)]:
        return broken[0]
    targets = [sample[1] for sample in samples if isinstance(sample, tuple)]
    if len({target.shape for target in targets}) < 2:
        stacked = default_collate(samples)
        return stacked if isinstance(stacked, Tensor) else (stacked[0], stacked[1])
    images = default_collate([sample[0] for sample in samples if isinstance(sample, tuple)])
    return images, pad_sequence(targets, batch_first=True, padding_value=PADDING)


def intact(read: Moved | Broken) -> Moved:
    """Return what was read.

    Raises:
        DataError: an image could not be read.
    """
    if isinstance(read, Broken):
        raise DataError(read.message)
    return read


class Pictures:
    """Images held as one tensor, returned as PIL images."""

    def __init__(self, part: InMemory) -> None:
        if part.images.shape[1] not in MODES:
            raise DataError(
                "augmentation image by image takes 1 or 3 channels, these images have"
                f" {part.images.shape[1]}"
            )
        self.part = part
        self.labels: Any = part.labels

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from torchvision.transforms.functional import to_pil_image

        return to_pil_image(self.part.images[index]), self.labels[index]
