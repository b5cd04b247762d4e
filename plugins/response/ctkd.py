"""Curriculum temperature (CTKD): soft targets at a temperature that is learnt against the
student, at first hardly, then fully.

Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv:2211.16231, its
global temperature: one number, learnt by a gradient reversal whose factor rises on half a cosine
from 0 to 1 over the first 10 epochs. Start, range and the parameter's first value, 1, as in the
released code. Its instance-wise temperature, a small network on the logits, is not here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

RISING: Any = kdkit.Ramp.model_validate({"from": 0, "to": 1, "epochs": 10, "shape": "cosine"})


class CurriculumTemperature(kdkit.Loss):
    """KL divergence of softened predictions, whose temperature climbs the divergence that the
    student descends.

    Formula: T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) with T = start + range * sigmoid(theta),
    mean over the batch, in nats

    theta is learnt; what reaches it is -`reversal` times its gradient. Logits (B, K) on both sides.
    `reversal` is a ramp by default: whoever calls the loss by hand sets it to a number.
    """

    name = "ctkd"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        start: float = Field(default=1.0, gt=0, description="Lower bound of the temperature.")
        range: float = Field(
            default=20.0,
            gt=0,
            description="How far above the lower bound the temperature may rise.",
        )
        reversal: kdkit.Rampable = Field(
            default=RISING,
            ge=0,
            description=(
                "Factor of the reversed gradient: how strongly the temperature makes it hard for"
                " the student."
            ),
        )

    options: Options
    theta: nn.Parameter

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        # 1, not 0, as in the released code: the temperature starts at 15.6, not in the middle
        self.theta = nn.Parameter(torch.ones((), device=student.logits.device))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        # reversed at theta alone: the student's own gradient keeps its sign
        theta: Tensor = _Reversal.apply(self.theta, self.options.reversal)
        t = self.options.start + self.options.range * theta.sigmoid()
        log_p, log_q = (
            F.log_softmax(student.logits / t, dim=1),
            F.log_softmax(teacher.logits / t, dim=1),
        )
        return t**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CurriculumTemperature]
