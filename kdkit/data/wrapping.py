"""The common part of loaders around another loader."""

from __future__ import annotations

from kdkit.data.loaders import TrainLoader


class WrappedLoader:
    """Training batches that are watched or changed on their way; `epoch` is the subclass's."""

    def __init__(self, loader: TrainLoader) -> None:
        self.labels = loader.labels
        self.indices = loader.indices
        self.num_samples = loader.num_samples
        self.indexed = loader.indexed
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)
