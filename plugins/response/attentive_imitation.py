"""Attentive imitation: the student imitates the teacher's numbers the more, the nearer they are to
the targets.

Saputra, de Gusmao, Almalioglu, Markham, Trigoni, "Distilling Knowledge From a Deep Pose Regressor
Network", ICCV 2019, arXiv:1908.00858. The paper's objective is alpha times the squared
error on the targets beside 1 - alpha times this loss:

    - {use: mse, weight: 0.5}
    - {use: attentive_imitation, weight: 0.5}

There eta is the teacher's largest squared error less its smallest, over all training data, measured
beforehand; that is the option `eta`. Without it, eta is the largest error in the batch, so that the
worst answer of each batch is left out. A weight below 0, at the teacher's largest error in the
paper, is 0 here.

Not the loss of Takamoto et al., 2020, arXiv:2002.12597, which rejects targets as outliers by the
teacher's answers, and has the student predict target and teacher by two heads.
"""

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class AttentiveImitation(kdkit.Loss):
    """Squared distance of the student's numbers from the teacher's, weighted per sample by how
    right the teacher is.

    Formula: w * sum_d (z_s - z_t)_d^2 with w = max(0, 1 - e_t / eta) and e_t = sum_d (z_t - y)_d^2,
    mean over the batch, in squared units of the targets

    eta is the option, or the largest e_t of the batch, in all processes together. A teacher without
    an error has w = 1. Answers and targets (B, D).
    """

    name = "attentive_imitation"
    knowledge = "response"
    tasks = frozenset({"numbers"})
    exceptions = {
        "check_teaches_every_part": "the sample at which the teacher is furthest off has weight 0"
    }

    class Options(kdkit.ResponseOptions):
        eta: float | None = Field(
            default=None,
            gt=0,
            description=(
                "Squared error at which the teacher counts no more, such as its largest in training"
                " (none: the largest in the batch)."
            ),
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        e_t = (teacher.logits - batch.labels.to(student.logits)).square().sum(1)
        eta: float | Tensor | None = self.options.eta
        if eta is None:
            # of all processes, so that a batch has the same weights however it is shared out
            largest = kdkit.gather(e_t.amax(0, keepdim=True)).amax()
            # a teacher without any error: 0 / the smallest normal number, not 0 / 0
            eta = largest.clamp_min(torch.finfo(largest.dtype).tiny)
        weight = (1 - e_t / eta).clamp_min(0)
        return (weight * (student.logits - teacher.logits).square().sum(1)).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AttentiveImitation]
