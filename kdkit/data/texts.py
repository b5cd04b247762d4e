"""Batches of texts, as token ids that are padded to the longest text of each batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import Texts
from kdkit.contracts.records import MASK, Batch
from kdkit.data.images import View


class HeldTexts:
    """Texts as one row of token ids on the device; see `kdkit.data.images.Images`."""

    def __init__(self, part: Texts, labels: Tensor, indices: Tensor, device: torch.device) -> None:
        self.labels, self.indices = labels[indices], indices
        self._labels, self._indices = self.labels.to(device), indices.to(device)
        lengths = torch.tensor(part.lengths)
        starts = lengths.cumsum(0) - lengths
        # on the host, so that finding a batch's length needs no device synchronisation
        self._longest = lengths[indices]
        self._lengths, self._starts = lengths[indices].to(device), starts[indices].to(device)
        self._padding = {name: part.padding.get(name, 0) for name in part.tokens}
        # one row without padding: a tensor (N, longest) would hold mostly padding
        self._tokens = {
            name: torch.tensor([*itertools.chain(*ids)], device=device)
            for name, ids in part.tokens.items()
        }

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        """Yield the batches; a text looks the same in every view."""
        for numbers in plan:
            chosen = numbers.to(self._starts.device)
            lengths = self._lengths[chosen, None]
            positions = torch.arange(int(self._longest[numbers.cpu()].max()), device=lengths.device)
            real = positions < lengths
            # * real: padding reads the text's first token, which is there, and is replaced below
            at = self._starts[chosen, None] + positions * real
            padded = {
                name: torch.where(real, ids[at], self._padding[name])
                for name, ids in self._tokens.items()
            }
            yield Batch({**padded, MASK: real.long()}, self._labels[chosen], self._indices[chosen])
