"""timm's mixup and cutmix of batches, drawn only from (seed, epoch, batch, process)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.data.wrapping import WrappedLoader
from kdkit.errors import RunError
from kdkit.randomness import seeded
from kdkit.recipe.sections import MixupSpec

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Mixes images (B, C, H, W) and labels in place."""


class MixedLoader(WrappedLoader):
    """Training batches whose images and labels are mixed by the task's mixer."""

    def __init__(
        self, loader: TrainLoader, spec: MixupSpec, mix: Mix, *, seed: int, rank: int = 0
    ) -> None:
        super().__init__(loader)
        self._spec = spec
        self._seed = seed
        self._rank = rank
        self._mix = mix

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        for step, batch in enumerate(self._loader.epoch(number, start, view, arrange), start):
            if 0 < self._spec.off_epoch <= number:
                yield batch
                continue
            # timm's mixers draw from NumPy's global generator
            with seeded(self._seed, "mixup", number, step, self._rank):
                mixed = self._mixed(batch)
            # outside of the block: the training step must not draw from this seed
            yield mixed

    def _mixed(self, batch: Batch) -> Batch:
        # timm mixes each image with the one at the mirrored place of the batch
        if not isinstance(batch.inputs, Tensor) or len(batch.labels) % 2:
            raise RunError(
                "train.mixup mixes an even number of images per batch and process, not"
                f" {len(batch.labels)}"
            )
        inputs, labels = self._mix(batch.inputs.clone(), batch.labels)  # timm mixes in place
        return replace(batch, inputs=inputs, labels=labels)


def options_of(spec: MixupSpec) -> dict[str, Any]:
    """Return the arguments of timm's Mixup."""
    return spec.model_dump(exclude={"off_epoch"})
