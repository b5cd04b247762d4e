"""A detector's own loss on true boxes, as torchvision computes it.

The losses of FCOS (arXiv:1904.01355), RetinaNet (arXiv:1708.02002), SSD (arXiv:1512.02325) and
Faster R-CNN (arXiv:1506.01497).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..tasks import _boxes as boxes


class DetectorOptions(kdkit.LossOptions):
    """Weights of the detector's own terms."""

    terms: dict[str, float] = Field(
        default_factory=dict,
        description=(
            "Weights of terms by torchvision's names, such as `{bbox_regression: 2}` (default: 1"
            " each)."
        ),
    )

    def taps(self) -> Sequence[kdkit.LayerPair]:
        return [kdkit.LayerPair(student=name, teacher=name) for name in OUTPUTS]


OUTPUTS = ("output1", "output2")  # of a detector: what its losses need, and its anchors


class DetectorLoss(kdkit.Loss):
    """Sum of the losses of the student's own kind of detector.

    Formula: sum over the terms of weight * term; the terms and what each is divided by are those of
    torchvision's class: classification and bbox_regression (RetinaNet, SSD), also bbox_ctrness
    (FCOS), or loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg (Faster R-CNN).

    Targets (B, M, 6) as in task `detection`; boxes that do not count are left out. In several
    processes, each divides by its own number of anchors that answer for an object.
    """

    name = "detector"
    knowledge = "labels"
    tasks = frozenset({"detection"})
    whole_answers = True
    needs_networks = True
    capturable = False  # how many rows answer for an object differs from step to step
    Options = DetectorOptions
    options: DetectorOptions

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.network = (network_of(context),)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        targets = batch.labels
        return loss_of(self.network[0], student, batch, targets, self.options.terms)


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
    counted = [
        {"boxes": rows[:, boxes.BOX], "labels": rows[:, boxes.LABEL].long()}
        for rows in (rows[rows[:, boxes.IGNORED] == 0] for rows in boxes.unpadded(targets))
    ]
    raw, anchors = (student.features[name] for name in OUTPUTS)
    assert isinstance(batch.inputs, Tensor)
    height, width = batch.inputs.shape[-2:]
    terms: dict[str, Tensor] = network.losses(raw, anchors, (height, width), counted)
    if unknown := weights.keys() - terms.keys():
        raise kdkit.ShapeError(
            f"terms: '{min(unknown)}' is no term of this detector; allowed: {', '.join(terms)}"
        )
    return sum((weights.get(name, 1.0) * term for name, term in terms.items()), raw.new_zeros(()))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DetectorLoss]
