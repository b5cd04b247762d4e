"""Transformed teacher matching (TTM): only the teacher is softened, by a power of its
probabilities; the student answers as it is.

Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
arXiv:2402.11148: TTM and, with `weighted`, WTTM. The exponent is 1 / T of the teacher; there is no
factor T^2. The paper adds the loss to the cross-entropy; its examples for CIFAR-100, VGG13 to VGG8,
are TTM with weight 45 at exponent 0.1, and WTTM beside CRD with weight 4 at exponent 0.2. U lies
between 1 and K^(1 - l), so that the weighted form, which multiplies by it, needs a much smaller
weight. The released code raises probabilities to the power, which round to 0 at margins of 100 and
more; here it is the softmax of l z_t, with the same values.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class TransformedTeacher(kdkit.Loss):
    """KL divergence between the power transform of the teacher's prediction and the student's
    prediction.

    Formula: KL(q^l / U || softmax(z_s)) with U = sum_k q_k^l, times U if `weighted`, mean over the
    batch, in nats

    q = softmax(z_t), and l is `exponent`: q^l / U is softmax(l z_t), the teacher at temperature
    1 / l. U is a constant of the student, the larger, the less sure the teacher is. At l = 1 it is
    1, and both forms are the plain divergence. Logits (B, K) on both sides.
    """

    name = "ttm"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        exponent: kdkit.Rampable = Field(
            default=0.1,
            gt=0,
            le=10,
            description="l: power of the teacher's probabilities; below 1 it softens them.",
        )
        weighted: bool = Field(
            default=False,
            description="Weigh each sample by U: more, the less sure the teacher is (WTTM).",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        # not a power of the softmax, which rounds to 0
        powers = self.options.exponent * F.log_softmax(teacher.logits, dim=1)
        log_p, log_q = F.log_softmax(student.logits, dim=1), F.log_softmax(powers, dim=1)
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        if self.options.weighted:
            divergence = divergence * powers.logsumexp(1).exp()
        return divergence.mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [TransformedTeacher]
