"""Training and measuring on a `Stream`, a dataset part that can only be read from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kdkit.contracts.dataset_source import SharedStream, Stream
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.data.augment import sample_seed, subseed
from kdkit.data.images import Broken, Finish, intact, loaded, stack
from kdkit.data.transforms import Transform
from kdkit.data.workers import leave_to_parent
from kdkit.errors import DataError
from kdkit.recipe.sections import DataSpec

Sample = tuple[Tensor | Broken, Any, int]


class StreamReader:
    """Reads one part, an epoch at a time, through worker processes.

    Args:
        part: the whole stream; process `rank` of `world` reads its share.
        batch_size: of this process.
        workers: number of processes that read.
        finish, transform: the processing of batches and of single images.
        targets: converts the stream's targets to a tensor.
    """

    def __init__(
        self,
        part: Stream,
        batch_size: int,
        workers: int,
        finish: Finish,
        transform: Transform,
        targets: Callable[[Sequence[Any]], Tensor],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.part = part
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self._workers = workers
        self._finish = finish
        self._transform = transform
        self._targets = targets

    def whole(self) -> StreamReader:
        """Return a reader of the whole part in this process."""
        return StreamReader(
            self.part, self.batch_size, self._workers, self._finish, self._transform, self._targets
        )

    def batches(self, seed: int | None, view: int | None) -> Iterator[Batch]:
        """Yield batches of one epoch in the order that follows from `seed` (and the number of
        workers); None: the order of the files.

        `Batch.index` numbers the images of this epoch; it is not a position in the dataset.
        """
        part = (
            self.part.share(self.rank, self.world)
            if isinstance(self.part, SharedStream)
            else self.part
        )
        loader: DataLoader[Any] = DataLoader(
            _Share(
                part,
                seed,
                self._workers,
                self.batch_size,
                self._transform,
                view or 0,
                self.rank,
                self.world,
            ),
            batch_size=self.batch_size,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._finish.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            generator=torch.Generator().manual_seed(seed or 0),  # determines the workers' own seeds
        )
        for pixels, labels, index in loaded(loader):
            yield self._finish(intact(pixels), self._targets(labels), index, view)


class _Share(IterableDataset[Sample]):
    def __init__(
        self,
        part: Stream,
        seed: int | None,
        workers: int,
        batch_size: int,
        transform: Transform,
        view: int,
        rank: int,
        world: int,
    ) -> None:
        self.part = part
        self.seed = seed
        self.workers = workers
        self.batch_size = batch_size
        self.transform = transform
        self.view = view
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for place, (image, label) in enumerate(
            self.part.read(self.seed, self.workers, self.batch_size)
        ):
            index = (first + place * step) * self.world + self.rank  # unique over the processes
            try:
                yield self.transform(image, self.view, index), label, index
            except DataError as error:
                yield Broken(str(error)), 0, index


def _collate(samples: list[Sample]) -> tuple[Tensor | Broken, list[Any], Tensor]:
    pixels, labels, index = zip(*samples, strict=True)
    return stack(list(pixels)), list(labels), torch.tensor(index)


class StreamTrainLoader:
    """Epochs of a stream. `labels` is empty: labels are unknown before they are read.

    An epoch has as many full batches as the stream's length allows; `drop_last: false` adds one
    more, filled up by the source with images of the next round. `start` reads the skipped batches
    and throws them away.
    """

    indexed = False

    def __init__(self, reader: StreamReader, seed: int, drop_last: bool) -> None:
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
        given = start
        for batch in islice(
            self._reader.batches(seed, number if view is None else view), start, len(self)
        ):
            given += 1
            yield batch
        if given < len(self):
            processes = (
                f"data.workers x {self._reader.world} processes"
                if self._reader.world > 1
                else "data.workers has processes"
            )
            raise DataError(
                f"the stream ended after {given} of {len(self)} batches: has it fewer files than"
                f" {processes}?"
            )


class StreamEvalLoader:
    """All images of a stream, once; with several processes each has its share, and shares may
    differ in size.
    """

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
    refuse_processes(part, world)


def refuse_processes(part: Stream, world: int) -> None:
    """Refuse a stream that several processes cannot share.

    Raises:
        DataError: several processes cannot read it.
    """
    if world > 1 and not isinstance(part, SharedStream):
        raise DataError(
            f"this dataset can only be read from start to end, which {world} training processes"
            " cannot share; use one"
        )
