"""Asks a served teacher for the answers to batches that are read ahead."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kdkit.cache.served import ServedTeacher
from kdkit.cache.teacher import Forward
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.data.wrapping import WrappedLoader
from kdkit.models.tapped import TappedModel


class AskedAhead:
    """Asks a served teacher for the answers to coming batches.

    Args:
        served: the teacher's servers.
        teacher: the model that they answer for.
        precision: the type that training autocasts to (None: fp32).
    """

    def __init__(
        self, served: ServedTeacher, teacher: TappedModel, precision: torch.dtype | None
    ) -> None:
        self._served, self._teacher, self._precision = served, teacher, precision
        # the images of a batch -> the answer that is under way, or None; weak, so that no batch is
        # kept alive
        self._coming: Any = WeakIdKeyDictionary()
        self._read = True  # whether the answers to batches are read, as far as is known

    def loader(self, train: TrainLoader) -> TrainLoader:
        """Wrap the training batches, to see which ones are coming."""
        return _Announced(train, self, len(self._served))

    def announce(self, batch: Batch) -> None:
        """Ask for the answer to a batch that is coming, unless nobody reads such answers."""
        self._coming[first_tensor(batch.inputs)] = (
            self._served.send(
                batch.inputs,
                [*self._teacher.layers],
                self._precision,
                logits=self._teacher.needs_logits,
            )
            if self._read
            else None
        )

    def leave(self, batch: Batch) -> None:
        """Note that the step with a batch is over."""
        if self._coming.pop(first_tensor(batch.inputs), None) is not None:
            self._read = False  # a stage without this teacher, or with views of the images

    def answer(self, inputs: Inputs, forward: Forward) -> Outputs:
        """Return the answer to a batch, which was asked for before, or to other images."""
        images: Tensor = first_tensor(inputs)
        if images not in self._coming:
            return forward(inputs)
        coming = self._coming[images]
        self._coming[images] = None
        if coming is None:
            self._read = True
            return forward(inputs)
        return self._served.received(coming, inputs)

    def close(self) -> None:
        """Ask nothing any more."""
        self._served.close()


class _Announced(WrappedLoader):
    """Training batches, of which a few are read ahead and announced."""

    def __init__(self, loader: TrainLoader, ahead: AskedAhead, depth: int) -> None:
        super().__init__(loader)
        self._ahead, self._depth = ahead, depth

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        waiting: collections.deque[Batch] = collections.deque()
        for batch in self._loader.epoch(number, start, view, arrange):
            self._ahead.announce(batch)
            waiting.append(batch)
            if len(waiting) > self._depth:
                yield from self._shown(waiting.popleft())
        while waiting:
            yield from self._shown(waiting.popleft())

    def _shown(self, batch: Batch) -> Iterator[Batch]:
        yield batch
        self._ahead.leave(batch)
