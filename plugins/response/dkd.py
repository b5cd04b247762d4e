"""Decoupled distillation: how sure the teacher is of the label, and how it ranks the other
classes, weighted apart.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, eq. 7; T^2 and the
batch mean as in the released code. That code takes the log of a sum of probabilities and hides the
label's logit by subtracting 1000: infinite or NaN at margins of 100. Here both parts come from
log-sum-exp over the non-target logits: the same values, finite everywhere. `standardize`: Sun et
al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427; rows of equal
logits count as uniform and have no gradient.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._classes import SeveralClasses, log_probabilities


class DKD(kdkit.Loss):
    """Decoupled KL divergences: of the label against the rest (TCKD), and among the other
    classes (NCKD).

    Formula: T^2 * (alpha * TCKD + beta * NCKD), mean over the batch, in nats

    TCKD = KL of (q_y, 1 - q_y) from (p_y, 1 - p_y), with p = softmax(z_s / T), q = softmax(z_t / T)
    and y the label; NCKD = the KL of the same kind between softmaxes over the K - 1 classes that
    are not y. Logits (B, K) on both sides, K >= 2.
    """

    name = "dkd"
    knowledge = "response"

    class Options(SeveralClasses):
        alpha: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of TCKD, the label against the rest."
        )
        beta: kdkit.Rampable = Field(
            default=8.0, ge=0, description="Factor of NCKD, the classes other than the label."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )
        standardize: bool = Field(
            default=False,
            description="Give every sample's logits mean 0 and deviation 1 first, on both sides.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        if self.options.standardize:
            z_s, z_t = kdkit.standardized(z_s), kdkit.standardized(z_t)
        label_s, others_s = log_probabilities(z_s / t, batch.classes)
        label_t, others_t = log_probabilities(z_t / t, batch.classes)
        tckd = F.kl_div(label_s, label_t, reduction="batchmean", log_target=True)
        nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
        return t**2 * (self.options.alpha * tckd + self.options.beta * nckd)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DKD]
