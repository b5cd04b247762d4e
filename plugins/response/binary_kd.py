"""Binary distillation: one yes-or-no question per class, answered as the teacher does.

Target softmax: the binary divergence in the released code of Hao et al., "Revisit the Power of
Vanilla Knowledge Distillation: from Small Scale to Large Scale", NeurIPS 2023, arXiv:2305.15781.
Target sigmoid, for labels that do not exclude each other: Yang et al., "Multi-Label Knowledge
Distillation", ICCV 2023, arXiv:2308.06453, its logit term. That is a sum of binary KL divergences;
a cross-entropy differs from it by the teacher's entropy, a constant, and here the mean is taken
over the classes too.
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class BinaryKD(kdkit.Loss):
    """Binary cross-entropy of every student logit with the teacher's probability of that class.

    Formula: -(q log sigmoid(z_s) + (1 - q) log sigmoid(-z_s)), mean over the batch and the classes,
    in nats

    q = softmax(z_t), or sigmoid(z_t) with `target: sigmoid`. Logits (B, K) on both sides.
    """

    name = "binary_kd"
    knowledge = "response"
    tasks = frozenset({"classes", "labels"})

    class Options(kdkit.ResponseOptions):
        target: Literal["softmax", "sigmoid"] = Field(
            default="softmax",
            description=(
                "The teacher's probabilities: `softmax` where classes exclude each other, else"
                " `sigmoid`."
            ),
        )

    options: Options

    @classmethod
    def for_tasks(cls, options: Any = None) -> frozenset[str]:
        """Softmax is over classes that exclude each other."""
        is_softmax = options is not None and options.target == "softmax"
        return frozenset({"classes"}) if is_softmax else cls.tasks

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        q = (
            teacher.logits.softmax(1)
            if self.options.target == "softmax"
            else teacher.logits.sigmoid()
        )
        # from logits: the logarithm of a sigmoid that rounds to 0 would be infinite
        return F.binary_cross_entropy_with_logits(student.logits, q)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [BinaryKD]
