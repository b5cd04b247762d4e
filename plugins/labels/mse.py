"""Mean squared error on the targets: the supervised term of regression.

Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2nd edition, Springer 2009,
doi:10.1007/978-0-387-84858-7, section 2.4.
"""

import torch.nn.functional as F
from torch import Tensor

import kdkit

from ._numbers import check_width


class MeanSquaredError(kdkit.Loss):
    """Mean squared difference of the student's numbers from the targets.

    Formula: (z_s - y)^2, mean over the batch and the outputs, in squared units of the targets

    Outputs of different units count by their squares: a dataset gives them on one scale. Student
    answers and targets (B, D); the teacher is not read.
    """

    name = "mse"
    knowledge = "labels"
    tasks = frozenset({"numbers"})

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        check_width(self.name, student, context)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        return F.mse_loss(student.logits, batch.labels.to(student.logits))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [MeanSquaredError]
