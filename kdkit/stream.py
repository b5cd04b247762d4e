"""Training and measuring on a `Stream`, a dataset part that can only be read from start to end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kdkit.augment import sample_seed, subseed
from kdkit.errors import DataError
from kdkit.images import Broken, Finish, intact, stack
from kdkit.providers import Stream
from kdkit.records import Batch
from kdkit.schema import DataSpec
from kdkit.signals import leave_to_parent
from kdkit.teaching import Arrange
from kdkit.transforms import Transform

Sample = tuple[Tensor | Broken, int, int]


class StreamReader:
    """Reads one part, an epoch at a time, through worker processes."""

    def __init__(self, part: Stream, batch_size: int, workers: int, finish: Finish, transform: Transform) -> None:
        self.part, self.batch_size, self._workers = part, batch_size, workers
        self._finish, self._transform = finish, transform

    def batches(self, seed: int | None, view: int | None) -> Iterator[Batch]:
        """Batches of one epoch in the order that `seed` (and the number of workers) gives; None: the order of the files.

        `Batch.index` numbers the images of this epoch; it is no place in the dataset.
        """
        loader: DataLoader[Any] = DataLoader(
            _Share(self.part, seed, self._workers, self.batch_size, self._transform, view or 0),
            batch_size=self.batch_size,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._finish.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            generator=torch.Generator().manual_seed(seed or 0),  # a worker's own seed comes from it
        )
        for pixels, labels, index in loader:
            yield self._finish(intact(pixels), labels, index, view)


class _Share(IterableDataset[Sample]):
    def __init__(self, part: Stream, seed: int | None, workers: int, batch_size: int, transform: Transform, view: int) -> None:
        self.part, self.seed, self.workers, self.batch_size = part, seed, workers, batch_size
        self.transform, self.view = transform, view

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for place, (image, label) in enumerate(self.part.read(self.seed, self.workers, self.batch_size)):
            index = first + place * step
            try:
                yield self.transform(image, self.view, index), int(label), index
            except DataError as error:
                yield Broken(str(error)), int(label), index


def _collate(samples: list[Sample]) -> tuple[Tensor | Broken, Tensor, Tensor]:
    pixels, labels, index = zip(*samples, strict=True)
    return stack(list(pixels)), torch.tensor(labels), torch.tensor(index)


class StreamTrainLoader:
    """Epochs of a stream. `labels` is empty: they are not known before they are read.

    An epoch has as many full batches as the stream's length allows; `drop_last: false` adds one more, filled up by the source
    with images of the next round. `start` reads the skipped batches and throws them away.
    """

    indexed = False

    def __init__(self, reader: StreamReader, seed: int, drop_last: bool) -> None:
        self.labels = self.indices = torch.empty(0, dtype=torch.int64)
        self.num_samples = len(reader.part)
        self._reader, self._seed, self._drop_last = reader, subseed(seed, "stream"), drop_last

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self._reader.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def epoch(self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None) -> Iterator[Batch]:
        if arrange is not None:
            raise DataError("this dataset can only be read from start to end, but the schedule chooses which images come together")
        seed = sample_seed(self._seed, number, 0) >> 33  # 31 bits: readers hand it to NumPy and TensorFlow
        given = start
        for batch in islice(self._reader.batches(seed, number if view is None else view), start, len(self)):
            given += 1
            yield batch
        if given < len(self):
            raise DataError(f"the stream ended after {given} of {len(self)} batches: has it fewer files than data.workers has processes?")


class StreamEvalLoader:
    """All images of a stream, once."""

    def __init__(self, reader: StreamReader) -> None:
        self.num_samples = len(reader.part)
        self._reader = reader

    def __len__(self) -> int:
        return -(-self.num_samples // self._reader.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._reader.batches(None, None)

    def whole(self) -> StreamEvalLoader:
        return self  # streams are read by one process alone


def refuse(spec: DataSpec, world: int) -> None:
    """Say what a stream cannot do.

    Raises:
        DataError: the recipe asks for it.
    """
    for key in ("train_samples", "train_fraction", "validation"):
        if getattr(spec, key) is not None:
            raise DataError(f"data.{key}: this dataset can only be read from start to end, so no part of it can be chosen")
    if spec.repeats > 1:
        raise DataError("data.repeats: this dataset can only be read from start to end, so no image can come repeatedly")
    if world > 1:
        raise DataError(f"this dataset can only be read from start to end, which {world} training processes cannot share; use one")
