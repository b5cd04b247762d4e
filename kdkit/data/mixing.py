"""timm's mixup and cutmix, as a step of the loader: what an image is mixed with follows from
(seed, epoch, batch, process) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.errors import RunError
from kdkit.randomness import seeded
from kdkit.recipe.sections import MixupSpec


class MixedLoader:
    """Training batches whose images and labels are mixed; labels become shares (B, K)."""

    def __init__(
        self, loader: TrainLoader, spec: MixupSpec, *, num_classes: int, seed: int, rank: int = 0
    ) -> None:
        self.labels = loader.labels
        self.indices = loader.indices
        self.num_samples = loader.num_samples
        self.indexed = loader.indexed
        self._loader = loader
        self._spec = spec
        self._seed = seed
        self._rank = rank
        self._mix = _timm(spec, num_classes)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        for place, batch in enumerate(self._loader.epoch(number, start, view, arrange), start):
            if 0 < self._spec.off_epoch <= number:
                yield batch
                continue
            with seeded(self._seed, "mixup", number, place, self._rank):
                mixed = self._mixed(batch)
            yield mixed

    def _mixed(self, batch: Batch) -> Batch:
        if not isinstance(batch.inputs, Tensor) or len(batch.labels) % 2:
            raise RunError(
                "train.mixup mixes an even number of images per batch and process, not"
                f" {len(batch.labels)}"
            )
        inputs, labels = self._mix(batch.inputs.clone(), batch.labels)  # timm mixes in place
        return replace(batch, inputs=inputs, labels=labels)


def _timm(spec: MixupSpec, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from timm.data import Mixup

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=spec.mixup_alpha,
        cutmix_alpha=spec.cutmix_alpha,
        prob=spec.prob,
        switch_prob=spec.switch_prob,
        mode=spec.mode,
        label_smoothing=0.0,  # cross_entropy's own option smooths
        num_classes=num_classes,
    )
    return mix
