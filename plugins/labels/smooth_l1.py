"""Smooth absolute error on the targets: quadratic near them, linear far away, so that outliers
count less than in a mean squared error.

Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, eq. 3 (beta 1); Huber's loss (1964) divided by
beta.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._numbers import check_width


class SmoothL1(kdkit.Loss):
    """Smooth absolute difference of the student's numbers from the targets.

    Formula: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = z_s - y, mean over the
    batch and the outputs, in units of the targets

    Student answers and targets (B, D); the teacher is not read.
    """

    name = "smooth_l1"
    knowledge = "labels"
    tasks = frozenset({"numbers"})

    class Options(kdkit.LossOptions):
        beta: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description=(
                "Where the quadratic part ends, in units of the targets; 0: the absolute error."
            ),
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        check_width(self.name, student, context)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        return F.smooth_l1_loss(z_s, batch.labels.to(z_s), beta=self.options.beta)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SmoothL1]
