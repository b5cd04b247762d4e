"""Activation boundaries: each of the student's neurons is on, or off, where the teacher's is.

Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
AAAI 2019, arXiv:1811.03233, section 3 (the alternative loss). The released code sums over layers,
each earlier one at half the weight of the next, divides by 1000, and leaves the connector out where
widths agree; here layers are averaged (give each an entry of its own to weigh them) and always have
a connector. Meant for a first stage, before the student learns the task: see the schedule `staged`.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class ActivationBoundary(kdkit.Loss):
    """Squared hinge that pushes the student's values beyond a margin, to the side of 0 on which
    the teacher's are.

    Formula: (m - s)^2 [s <= m] where t > 0 and (s + m)^2 [s > -m] elsewhere, summed over channels
    and positions, mean over the batch, then over the layer pairs; s = r(f_s), t = f_t and m the
    margin

    Reads values before the activation: name what an activation takes, such as
    `layer1.2.act2@input`, or a batch norm. Maps (B, C, H, W), or tokens of a square grid. r, the
    connector, is a 1x1 convolution and batch normalisation, then a bilinear resize to the teacher's
    size where that differs.
    """

    name = "ab"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        margin: kdkit.Rampable = Field(
            default=1.0, gt=0, description="m: how far beyond 0 the student's values are pushed."
        )

    options: Options
    connectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.connectors = nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            c_s, c_t = f_s.shape[1], f_t.shape[1]
            self.connectors.append(
                # no bias: batch normalisation would take it away
                nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), kdkit.AnyBatchNorm(c_t))
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        hinges = []
        for connector, (f_s, f_t) in zip(
            self.connectors, self.options.pairs(student, teacher), strict=True
        ):
            s = kdkit.resized(connector(f_s), f_t.shape[2:])
            # mirrored where the teacher's neuron is on, so that one hinge serves both sides
            towards = torch.where(f_t > 0, -s, s)
            # the released code's factor of 1/1000 belongs in the recipe's weight
            hinges.append(F.relu(towards + self.options.margin).square().sum() / len(s))
        return torch.stack(hinges).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ActivationBoundary]
