"""Binary distillation: one yes-or-no question per class, answered as the teacher does.

Target softmax: the binary divergence in the released code of Hao et al., "Revisit the Power of
Vanilla Knowledge Distillation: from Small Scale to Large Scale", NeurIPS 2023, arXiv:2305.15781.
Target sigmoid, for labels that do not exclude each other: Yang et al., "Multi-Label Knowledge
Distillation", ICCV 2023, arXiv:2308.06453, its logit term. That is a sum of binary KL divergences;
a cross-entropy differs from it by the teacher's entropy, a constant, and here the mean is taken
over the classes too. `focal`: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object
Detection", CVPR 2024, arXiv:2306.11369, its quality focal loss between two heads, with exponent 1,
target sigmoid and a mean over rows and classes, or their sum divided by the number of positives.
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

import kdkit


class BinaryKD(kdkit.Loss):
    """Binary cross-entropy of every student logit with the teacher's probability of that class.

    Formula: -(q log sigmoid(z_s) + (1 - q) log sigmoid(-z_s)), mean over the batch and the classes,
    in nats

    q = softmax(z_t), or sigmoid(z_t) with `target: sigmoid`. With `focal`, each term is multiplied
    by |sigmoid(z_s) - q|^focal, through which the gradient passes too. Logits (B, K) on both sides.
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
        focal: float = Field(
            default=0.0,
            ge=0,
            le=10,
            description=(
                "Exponent of the two probabilities' distance, which then weighs each term; 0: all"
                " count alike."
            ),
            json_schema_extra={"later": True},
        )

        @field_validator("focal")
        @classmethod
        def _has_a_gradient(cls, value: float) -> float:
            if 0 < value < 1:
                raise ValueError(
                    "must be 0 or at least 1: equal probabilities have no slope between"
                )
            return value

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
        if not self.options.focal:
            return F.binary_cross_entropy_with_logits(student.logits, q)
        each = F.binary_cross_entropy_with_logits(student.logits, q, reduction="none")
        return ((student.logits.sigmoid() - q).abs() ** self.options.focal * each).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [BinaryKD]
