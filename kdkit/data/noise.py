"""Random images in place of training images, where a schedule makes its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdkit.contracts.inputs import Shape
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.errors import DataError
from kdkit.randomness import derived
from kdkit.recipe.data_section import DataSpec


class NoiseLoader:
    """Batches of independent pixels, uniform in [0, 1], without labels (-1); see `TrainLoader`.

    They stand in for images until the schedule has made some: losses are set up on them, and
    `Stage.prepare` replaces them before each step.
    """

    indexed = False
    num_samples = 0

    def __init__(self, spec: DataSpec, shape: Shape, seed: int, device: torch.device) -> None:
        assert spec.synthetic_batches is not None
        self._batches, self._size = spec.synthetic_batches, spec.batch_size
        self._shape, self._seed, self._device = shape, seed, device
        self.labels = self.indices = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._batches

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        if arrange is not None:
            raise DataError("images that the schedule makes cannot be arranged")
        for i in range(start, self._batches):
            drawn = derived(self._seed, "noise", number if view is None else view, i)
            random = torch.Generator().manual_seed(drawn)
            images = torch.rand((self._size, *self._shape), generator=random).to(self._device)
            index = torch.arange(self._size, device=self._device)
            yield Batch(images, torch.full_like(index, -1), index)
