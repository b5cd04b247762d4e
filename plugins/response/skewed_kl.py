"""Forward or reverse KL divergence, the second distribution mixed with some of the first.

Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
arXiv:2402.03898, section 3.1: skew KL and skew reverse KL, with a 0.1 in the paper. At a = 0 they
are the two divergences themselves. The reverse one is what Gu et al., "MiniLLM: Knowledge
Distillation of Large Language Models", ICLR 2024, arXiv:2306.08543, minimise over whole texts of
the student, by policy gradients; here it is of each row, as on each token. There is no factor T^2.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class SkewedKL(kdkit.Loss):
    """Divergence of one prediction from the other, mixed with a share of the first.

    Formula: KL(u || a u + (1 - a) v), mean over the batch, in nats

    u = softmax(z_t / T) and v = softmax(z_s / T) for the direction `forward`: the student covers
    what the teacher deems possible; the other way round for `reverse`: it keeps to what the teacher
    deems likely. a is `alpha`: 0 is the plain divergence; above 0 the value is at most -log a,
    where the plain one has no bound. Logits (B, K) on both sides.
    """

    name = "skewed_kl"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        direction: Literal["forward", "reverse"] = Field(
            default="forward",
            description="Whose prediction comes first: the teacher's; `reverse`: the student's.",
        )
        alpha: kdkit.Rampable = Field(
            default=0.1,
            ge=0,
            lt=1,
            description="Share a of the first in the mixture; 0: none, the plain divergence.",
        )
        temperature: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        a, t = self.options.alpha, self.options.temperature
        first, second = (F.log_softmax(x.logits / t, dim=1) for x in (teacher, student))
        if self.options.direction == "reverse":
            first, second = second, first
        if a > 0:
            # by logarithms: a mixture of probabilities rounds to 0 where both are small
            second = torch.logaddexp(first + math.log(a), second + math.log1p(-a))
        return F.kl_div(second, first, reduction="batchmean", log_target=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SkewedKL]
