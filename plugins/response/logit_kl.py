"""Soft targets: the student's class distribution follows the teacher's, both softened by a
temperature.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531,
section 2. The paper writes a cross-entropy with the soft targets; the KL divergence differs from it
by the teacher's entropy, a constant, and is 0 when both agree. `standardize`: Sun et al., "Logit
Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1; a row of equal
logits, for which the released code divides by 1e-7, counts as uniform and has no gradient here.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class LogitKL(kdkit.Loss):
    """KL divergence between the teacher's and the student's softened predictions.

    Formula: T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch, in nats

    With `standardize`, z becomes (z - mean) / (1e-7 + unbiased standard deviation) per sample
    first, on both sides. With `only_correct`, the mean is over the samples whose largest teacher
    logit is the label's (0 if there is none). T^2 keeps the gradient's size when T changes. Logits
    (B, K) on both sides.
    """

    name = "logit_kl"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )
        standardize: bool = Field(
            default=False,
            description="Give every sample's logits mean 0 and deviation 1 first, on both sides.",
        )
        only_correct: bool = Field(
            default=False,
            description="Learn only from samples that the teacher classifies correctly.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        correct = (
            z_t.argmax(1) == batch.classes
            if self.options.only_correct
            else torch.ones_like(z_t[:, 0], dtype=torch.bool)
        )
        if self.options.standardize:
            z_s, z_t = kdkit.standardized(z_s), kdkit.standardized(z_t)
        log_p, log_q = F.log_softmax(z_s / t, dim=1), F.log_softmax(z_t / t, dim=1)
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        # a product, not a selection: the host would wait for its size
        # where the teacher gets none right: 0 / 1, not 0 / 0
        return t**2 * (divergence * correct).sum() / correct.sum().clamp_min(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LogitKL]
