"""The loss of the student's own kind of detector, for true boxes and for those of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import kdkit

from ..tasks import _boxes as boxes

OUTPUTS = ("output1", "output2")  # of a detector: what its losses need, and its anchors
COUNT = "count"  # among a detector's terms, what they are divided by


def network_of(context: kdkit.Context | None) -> nn.Module:
    """Return the student's network, if it is a detector.

    Raises:
        ShapeError: it is not.
    """
    if context is None or not hasattr(context.student, "losses"):
        raise kdkit.ShapeError(
            "the student is no detector with a loss of its own; take `detector/fcos`,"
            " `torchvision/fcos_resnet50_fpn`..."
        )
    return context.student


def loss_of(
    loss: kdkit.Loss,
    network: Any,
    student: kdkit.Outputs,
    batch: kdkit.Batch,
    targets: Tensor,
    weights: Mapping[str, float],
) -> Tensor:
    """Compute a detector's weighted loss of an answer for targets (B, M, 6).

    Raises:
        ShapeError: a weight is for a term that it does not have.
    """
    raw, anchors = (student.features[name] for name in OUTPUTS)
    assert isinstance(batch.inputs, Tensor)
    height, width = batch.inputs.shape[-2:]
    counted = [
        {"boxes": rows[:, boxes.BOX], "labels": rows[:, boxes.LABEL].long()}
        for rows in (rows[rows[:, boxes.IGNORED] == 0] for rows in boxes.unpadded(targets))
    ]
    terms: dict[str, Tensor] = network.losses(raw, anchors, (height, width), counted)
    count = terms.pop(COUNT, None)
    if unknown := weights.keys() - terms.keys():
        raise kdkit.ShapeError(
            f"terms: '{min(unknown)}' is no term of this detector; allowed: {', '.join(terms)}"
        )
    total = sum((weights.get(name, 1.0) * term for name, term in terms.items()), raw.new_zeros(()))
    return total if count is None else loss.share(count, raw.device, least=1) * total
