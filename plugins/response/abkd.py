"""Alpha-beta divergence (ABKD): two exponents set how much errors on likely classes count, and how
much the student's own confidence does.

Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation
via alpha-beta-Divergence", ICML 2025, arXiv:2505.04560, with the exponents of the released script
for images; there is no factor T^2. The paper adds the loss to the cross-entropy with weight 32 or
64. Where one exponent is 0, the released code divides by the other once, not twice, so that its
value jumps there; here it is the limit. Negative exponents, for which the divergence is unbounded,
are refused.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

# of a sum of exponents: below it, the limit is more exact in fp32 than the difference of powers
SMALLEST = 1e-3


class AlphaBeta(kdkit.Loss):
    """Alpha-beta divergence between the teacher's and the student's softened predictions.

    Formula: -1 / (a b) * sum_k (q_k^a p_k^b - a / (a + b) q_k^(a + b) - b / (a + b) p_k^(a + b)),
    mean over the batch

    p = softmax(z_s / T), q = softmax(z_t / T); a is `alpha`, b is `beta`, both at least 0. (1, 0)
    is KL(q || p), (0, 1) is KL(p || q), both in nats, and (0.5, 0.5) is four times the squared
    Hellinger distance. Where an exponent is 0 it is the limit; if both are, or sum to less than
    1e-3, that is half the sum of (log q_k - log p_k)^2. Logits (B, K) on both sides.
    """

    name = "abkd"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        alpha: kdkit.Rampable = Field(
            default=0.8,
            ge=0,
            le=5,
            description="a: the larger, the more the teacher's likely classes count.",
        )
        beta: kdkit.Rampable = Field(
            default=0.3,
            ge=0,
            le=5,
            description="b: the larger, the more the student's likely classes count.",
        )
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        a, b, t = self.options.alpha, self.options.beta, self.options.temperature
        log_p = F.log_softmax(student.logits / t, dim=1)
        log_q = F.log_softmax(teacher.logits / t, dim=1)
        gap = log_q - log_p
        if a + b < SMALLEST:
            return gap.square().sum(1).mean() / 2
        # the same sum, grouped as [q^a (q^b - p^b) / b - p^b (q^a - p^a) / a] / (a + b): no small
        # divisor, and no power overflows
        larger = torch.maximum(log_p, log_q)
        of_q = torch.exp(a * log_q + b * larger) * decrease(gap.abs(), b)
        of_p = torch.exp(b * log_p + a * larger) * decrease(gap.abs(), a)
        return (gap.sign() * (of_q - of_p)).sum(1).mean() / (a + b)


def decrease(x: Tensor, rate: float) -> Tensor:
    """(1 - exp(-rate x)) / rate, which is x at rate 0."""
    return x if rate == 0 else -torch.expm1(-rate * x) / rate


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AlphaBeta]
