"""List-wise distillation (PLD): the student is to rank the label first and then the other classes
as the teacher does, choice by choice.

Bassam et al., "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", NeurIPS 2025,
arXiv:2506.12542: the Plackett-Luce likelihood of the teacher's ranking with the label in front,
each choice weighted by the teacher's probability of the class. It takes the place of the
cross-entropy, with weight 1: the first choice is the cross-entropy, weighted. No released code was
seen.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class PlackettLuce(kdkit.Loss):
    """Negative log-likelihood of the teacher's ranking of the classes under the student's logits.

    Formula: -sum_i q_i (z_i - log sum_(j >= i) exp(z_j)), mean over the batch, in nats

    i counts the classes in the order of the list: the label, then the others from the teacher's
    largest logit to its smallest, equal ones by their number. z are the student's logits in that
    order, q the teacher's softmax(z_t / T). The last class adds nothing. Of a mixed sample, the
    label is the class with the largest share. Logits (B, K) on both sides.
    """

    name = "pld"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        temperature: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            description="T: softens the teacher's weights of the choices, not its ranking.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_t = teacher.logits
        ranked = z_t.scatter(1, batch.classes[:, None], math.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        z = student.logits.gather(1, order)
        q = (z_t / self.options.temperature).softmax(1).gather(1, order)
        # of each class and those behind it
        rest = torch.logcumsumexp(z.flip(1), dim=1).flip(1)
        return (q * (rest - z)).sum(1).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PlackettLuce]
