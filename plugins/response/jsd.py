"""Generalised Jensen-Shannon divergence: from covering all that the teacher deems possible to
keeping to what it deems likely.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
ICLR 2024, arXiv:2306.13649, eq. 1. The paper applies it to tokens that the student wrote; this is
the divergence itself. At both ends it is 0 by that equation; there the usual convention holds, its
limit after division by b or 1 - b: the forward or the reverse KL divergence. There is no factor
T^2.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class JensenShannon(kdkit.Loss):
    """Divergence of both predictions from their mixture.

    Formula: b KL(q || m) + (1 - b) KL(p || m) with m = (1 - b) p + b q, mean over the batch, in
    nats

    p = softmax(z_s / T), q = softmax(z_t / T) and b is `beta`; at b = 0 it is KL(q || p), at b = 1
    KL(p || q). Logits (B, K) on both sides.
    """

    name = "jsd"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        beta: kdkit.Rampable = Field(
            default=0.5,
            ge=0,
            le=1,
            description="The teacher's share b of the mixture: 0 forward KL, 1 reverse KL.",
        )
        temperature: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        b, t = self.options.beta, self.options.temperature
        log_p, log_q = (
            F.log_softmax(student.logits / t, dim=1),
            F.log_softmax(teacher.logits / t, dim=1),
        )
        # at both ends the mixture is one of the two, and the logarithm of a share is infinite
        if b == 0:
            return divergence(log_q, log_p)
        if b == 1:
            return divergence(log_p, log_q)
        # by logarithms: a mixture of probabilities rounds to 0 where both are small
        log_m = torch.logaddexp(log_p + math.log1p(-b), log_q + math.log(b))
        return b * divergence(log_q, log_m) + (1 - b) * divergence(log_p, log_m)


def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities (B, K), mean over the batch."""
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [JensenShannon]
