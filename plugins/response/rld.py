"""Refined logits (RLD): how sure the teacher is of its first choice goes to the label, and only
classes that the teacher ranks below the label are compared.

Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv:2408.07703: sample
confidence and masked correlation. For CIFAR-100 the paper adds the loss to the cross-entropy,
ramped up over 20 epochs; for ImageNet `beta` is 0.5 and T is 1, without a ramp. The released code
takes the log of a sum of probabilities, infinite or NaN at margins of 100, and masks by
subtracting 1e9; here the first comes from log-sum-exp and the mask is exact, with the same values.
`standardize`: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
arXiv:2403.01427; rows of equal logits count as uniform and have no gradient.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._classes import SeveralClasses


class RefinedLogits(kdkit.Loss):
    """KL divergences of the label's confidence from that of the teacher's first choice, and among
    the classes that the teacher ranks below the label.

    Formula: alpha * T_y^2 * KL((q_top, 1 - q_top) || (p_y, 1 - p_y)) + beta * T^2 * KL(q' || p'),
    mean over the batch, in nats

    p = softmax(z_s / T_y), q = softmax(z_t / T_y), y is the label and top the teacher's largest
    logit (the first of equal ones). q', p' are softmaxes at T over the classes whose teacher logit
    is smaller than the label's; a sample with at most one such class adds 0. Of a mixed sample, y
    is the class with the largest share. Logits (B, K) on both sides, K >= 2.
    """

    name = "rld"
    knowledge = "response"

    class Options(SeveralClasses):
        alpha: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the part on the label's confidence."
        )
        beta: kdkit.Rampable = Field(
            default=8.0, ge=0, description="Factor of the part on the classes below the label."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens the classes below the label."
        )
        label_temperature: kdkit.Rampable = Field(
            default=1.0, gt=0, description="T_y: softens the confidences."
        )
        standardize: bool = Field(
            default=False,
            description="Give every sample's logits mean 0 and deviation 1 first, on both sides.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s, z_t = student.logits, teacher.logits
        y, top = batch.classes[:, None], z_t.argmax(1, keepdim=True)
        # before anything rounds: a tie with the label must stay one
        below = z_t < z_t.gather(1, y)
        if self.options.standardize:
            z_s, z_t = kdkit.standardized(z_s), kdkit.standardized(z_t)
        t_y, t = self.options.label_temperature, self.options.temperature
        confidence = F.kl_div(
            confidences(z_s / t_y, y),
            confidences(z_t / t_y, top),
            reduction="batchmean",
            log_target=True,
        )
        correlation = divergence_among(z_s / t, z_t / t, below).mean()
        return self.options.alpha * t_y**2 * confidence + self.options.beta * t**2 * correlation


def confidences(z: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of the chosen class (B, 1) and of the rest."""
    rest = z.scatter(1, chosen, -math.inf).logsumexp(1, keepdim=True)
    margin = z.gather(1, chosen) - rest
    # both from one margin: log(1 - sigmoid) would be infinite where the sigmoid rounds to 1
    return F.logsigmoid(torch.cat([margin, -margin], 1))


def divergence_among(z_s: Tensor, z_t: Tensor, chosen: Tensor) -> Tensor:
    """KL divergence (B,) between softmaxes over the chosen classes (B, K); 0 where none is."""
    empty = ~chosen.any(1, keepdim=True)
    # a softmax over no class is NaN: such a row takes all classes, and is left out below
    left_out = ~(chosen | empty)
    log_p, log_q = (
        # 0, not -inf, where a class is left out: the difference of two infinities is NaN
        F.log_softmax(z.masked_fill(left_out, -math.inf), dim=1).masked_fill(left_out, 0.0)
        for z in (z_s, z_t)
    )
    terms = log_q.exp() * (log_q - log_p)
    return terms.masked_fill(left_out | empty, 0.0).sum(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [RefinedLogits]
