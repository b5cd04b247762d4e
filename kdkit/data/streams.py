"""Training and measuring on a `Stream`, a dataset part that can only be read from start to end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kdkit.contracts.dataset_source import SharedStream, Stream
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.data.augment import sample_seed, subseed
from kdkit.data.images import Broken, Finish, Moved, intact, loaded, stack
from kdkit.data.transforms import Transform
from kdkit.data.workers import leave_to_parent
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec

Sample = tuple[Moved | Broken, Any, int]


@dataclass(frozen=True)
class StreamReader:
    """Reads one part, an epoch at a time, through worker processes.

    Attributes:
        part: the whole stream; process `rank` of `world` reads its share.
        batch_size: of this process.
        workers: number of processes that read.
        finish, transform: the processing of batches and of single images.
        targets: converts the stream's targets to a tensor.
    """

    part: Stream
    batch_size: int
    workers: int
    finish: Finish
    transform: Transform
    targets: Callable[[Sequence[Any]], Tensor]
    rank: int = 0
    world: int = 1

    def whole(self) -> StreamReader:
        """Return a reader of the whole part in this process."""
        return replace(self, rank=0, world=1)

    def batches(self, seed: int | None, view: int | None) -> Iterator[Batch]:
        """Yield an epoch's batches in the order of `seed` and the workers; None: of the files.

        `Batch.index` numbers the images of this epoch; it is not a position in the dataset.
        """
        loader: DataLoader[Any] = DataLoader(
            _Share(self, seed, view or 0),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.finish.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            generator=torch.Generator().manual_seed(seed or 0),  # determines the workers' own seeds
        )
        for read, labels, index in loaded(loader):
            moved = intact(read)
            pixels, found = (moved, self.targets(labels)) if isinstance(moved, Tensor) else moved
            yield self.finish(pixels, found, index, view)


class _Share(IterableDataset[Sample]):
    """One process's images of an epoch, transformed."""

    def __init__(self, reader: StreamReader, seed: int | None, view: int) -> None:
        part = reader.part
        self._rank, self._world = reader.rank, reader.world
        share = part.share(self._rank, self._world) if isinstance(part, SharedStream) else part
        self._images = functools.partial(share.read, seed, reader.workers, reader.batch_size)
        self._transform = reader.transform
        self._view = view

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (image, label) in enumerate(self._images()):
            # unique over workers and processes
            index = (first + number * step) * self._world + self._rank
            try:
                yield self._transform((image, label), self._view, index), label, index
            except DataError as error:
                yield Broken(str(error)), 0, index


def _collate(samples: list[Sample]) -> tuple[Moved | Broken, list[Any], Tensor]:
    read, labels, index = zip(*samples, strict=True)
    stacked = stack(list(read))
    # targets that have moved are in `stacked`
    return stacked, list(labels) if isinstance(stacked, Tensor) else [], torch.tensor(index)


class StreamTrainLoader:
    """Epochs of a stream. `labels` is empty: labels are unknown before they are read.

    An epoch has as many full batches as the stream's length allows; `drop_last: false` adds one
    more, filled up by the source with images of the next round. `start` reads the skipped batches
    and throws them away.
    """

    indexed = False

    def __init__(self, reader: StreamReader, seed: int, drop_last: bool) -> None:
        # nothing is known of a sample before it is read
        self.labels = self.indices = torch.empty(0, dtype=torch.int64)
        self.num_samples = len(reader.part)
        self._reader = reader
        self._seed = subseed(seed, "stream")
        self._drop_last = drop_last

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self._reader.batch_size * self._reader.world)
        return full + (rest > 0 and not self._drop_last)

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        if arrange is not None:
            raise DataError(
                "this dataset can only be read from start to end, but the schedule chooses which"
                " images come together"
            )
        # 31 bits: readers pass it to NumPy and TensorFlow
        seed = sample_seed(self._seed, number, 0) >> 33
        batches = self._reader.batches(seed, number if view is None else view)
        count = start
        # cut off: a source may round its shares up, and repeat images
        for batch in islice(batches, start, len(self)):
            count += 1
            yield batch
        if count < len(self):
            world = self._reader.world
            processes = "data.workers has processes"
            if world > 1:
                processes = f"data.workers x {world} processes"
            raise DataError(
                f"the stream ended after {count} of {len(self)} batches: has it fewer files than"
                f" {processes}?"
            )


class StreamEvalLoader:
    """All images of a stream, once; shares of several processes may differ in size."""

    def __init__(self, reader: StreamReader) -> None:
        self.num_samples = len(reader.part)
        self._reader = reader

    def __len__(self) -> int:
        return -(-self.num_samples // (self._reader.batch_size * self._reader.world))

    def __iter__(self) -> Iterator[Batch]:
        return self._reader.batches(None, None)

    def whole(self) -> StreamEvalLoader:
        return StreamEvalLoader(self._reader.whole())


def refuse(spec: DataSpec, part: Stream, world: int) -> None:
    """Refuse options that a stream cannot fulfil.

    Raises:
        DataError: the recipe sets such an option.
    """
    for key in ("train_samples", "train_fraction", "validation"):
        if getattr(spec, key) is not None:
            raise DataError(
                f"data.{key}: this dataset can only be read from start to end, so no part of it can"
                " be chosen"
            )
    if spec.repeating:
        raise DataError(
            f"data.{spec.repeating}: this dataset can only be read from start to end, so no image"
            " can come repeatedly"
        )
    if spec.unlabelled is not None:
        raise DataError(
            "data.unlabelled: this dataset can only be read from start to end, so no others can"
            " come beside it"
        )
    refuse_processes(part, world)


def refuse_processes(part: Stream, world: int) -> None:
    """Refuse a stream that several processes cannot share.

    Raises:
        DataError: several processes cannot read it.
    """
    # every process would read all of it, and train on the same images
    if world > 1 and not isinstance(part, SharedStream):
        raise DataError(
            f"this dataset can only be read from start to end, which {world} training processes"
            " cannot share; use one"
        )
