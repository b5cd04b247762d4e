"""A detector's own loss on true boxes, as torchvision computes it.

Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv:1904.01355;
Lin et al., "Focal Loss for Dense Object Detection" (RetinaNet), ICCV 2017, arXiv:1708.02002; Liu et
al., "SSD: Single Shot MultiBox Detector", ECCV 2016, arXiv:1512.02325; Ren et al., "Faster R-CNN",
NeurIPS 2015, arXiv:1506.01497.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import kdkit

from ._detector import OUTPUTS, loss_of, network_of


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


class DetectorLoss(kdkit.Loss):
    """Sum of the losses of the student's own kind of detector.

    Formula: sum over the terms of weight * term; the terms and what each is divided by are those of
    torchvision's class: classification and bbox_regression (RetinaNet, SSD), also bbox_ctrness
    (FCOS), or loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg (Faster R-CNN).

    Targets (B, M, 6) as in task `detection`; boxes that do not count are left out. Several
    processes divide by the number of rows that answer for an object in all of them; those of Faster
    R-CNN, which draws some rows of each image, are means over the processes.
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
        (network,), terms = self.network, self.options.terms
        return loss_of(self, network, student, batch, batch.labels, terms)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DetectorLoss]
