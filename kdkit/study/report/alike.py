"""Layers of a student beside those of its teacher, on test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkit.contracts.inputs import rows
from kdkit.contracts.layers import stage_paths
from kdkit.contracts.records import Batch
from kdkit.errors import TapError
from kdkit.models.tapped import TappedModel
from kdkit.study.report.cka import LayerSimilarity

IMAGES = 1024  # number of images for comparing layers


@dataclass(frozen=True)
class Alike:
    """Linear CKA (teacher's layers, student's layers), and the number of images."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    images: int


@torch.no_grad()
def alike(student: TappedModel, teacher: TappedModel, batches: Iterable[Batch]) -> Alike:
    """Compute the CKA of the stages, the embedding and the logits, as far as the networks have
    them.

    Raises:
        TapError: one of them has none that can be observed.
    """
    first = next(iter(batches))
    ours, theirs = _observed(student, first), _observed(teacher, first)
    similarity = LayerSimilarity(tuple(theirs.layers), tuple(ours.layers))
    for batch in batches:
        # Every batch costs a Gram matrix of each layer of both networks.
        if similarity.samples >= IMAGES:
            break
        similarity.add(theirs(batch.inputs).features, ours(batch.inputs).features)
    return Alike(similarity.rows, similarity.columns, similarity.matrix(), similarity.samples)


def _observed(model: TappedModel, batch: Batch) -> TappedModel:
    """Return the model with taps on those of its stages, embedding and logits that can be
    observed.
    """
    names = [
        *(f"stage{i}" for i in range(1, len(stage_paths(model.module)) + 1)),
        "penultimate",
        "logits",
    ]
    seen = [name for name in names if _answers(model, name, batch)]
    if not seen:
        raise TapError(f"{model.role}: no stage of it can be observed")
    return _tapped(model, seen)


def _answers(model: TappedModel, name: str, batch: Batch) -> bool:
    try:
        # Two images are enough to see whether the layer gives one tensor.
        few = torch.arange(min(2, len(batch.index)), device=batch.index.device)
        _tapped(model, [name])(rows(batch.inputs, few))
    except TapError:
        return False
    return True


def _tapped(model: TappedModel, names: Sequence[str]) -> TappedModel:
    return TappedModel(
        model.module,
        names,
        adapt=model.adapt,
        role=model.role,
        channels_last=model.channels_last,
        precision=model.precision,
    )
