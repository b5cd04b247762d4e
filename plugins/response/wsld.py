"""Weighted soft labels (WSLD): soft targets count less for samples on which the student already
does as well as the teacher.

Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective", ICLR 2021, arXiv:2102.00650, with the 1e-7 of the released code, which knows no mixed
labels; here their cross-entropy is that with the shares.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class WSLD(kdkit.Loss):
    """Cross-entropy with the teacher's softened prediction, weighted per sample by how far the
    student is behind.

    Formula: T^2 * w * -sum_k q_k log p_k with w = 1 - exp(-CE_s / (CE_t + 1e-7)), mean over the
    batch, in nats

    p = softmax(z_s / T), q = softmax(z_t / T); CE_s and CE_t are the two models' cross-entropies
    with the labels, at T = 1, and w is a constant: no gradient passes through it. Labels may be
    shares of the classes (B, K). Logits (B, K) on both sides.
    """

    name = "wsld"
    knowledge = "response"
    exceptions = {
        "check_the_gradient_is_that_of_the_value": (
            "the weight of a sample is a constant, as in the paper"
        ),
    }

    class Options(kdkit.ResponseOptions):
        temperature: kdkit.Rampable = Field(
            default=2.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        ce_s, ce_t = (
            F.cross_entropy(z, batch.labels, reduction="none") for z in (z_s.detach(), z_t)
        )
        # expm1 keeps the digits of weights near 0, which 1 - exp loses
        weight = -torch.expm1(-ce_s / (ce_t + 1e-7))
        soft = F.cross_entropy(z_s / t, (z_t / t).softmax(1), reduction="none")
        return t**2 * (weight * soft).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [WSLD]
