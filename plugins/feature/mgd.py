"""Masked generation: from the student's features with holes in them, a small network must make
the teacher's whole ones.

Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529, section 3; layers and
reduction as in the released code. The paper masks positions; so does the released code for
detection and segmentation, while that for classification masks whole channels (`mask: channels`),
with a ratio of 0.15. Where sizes differ, the paper asks for equal ones; here the student's map is
resized.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class MaskedGeneration(kdkit.Loss):
    """Squared error of the teacher's map, generated from the student's aligned map with a random
    part of it set to zero.

    Formula: (G(M * align(f_s)) - f_t)^2, sum over channels and positions, mean over the batch, then
    over the layer pairs

    G is two 3x3 convolutions with a ReLU between them; `align` a 1x1 convolution where the channels
    differ, then a bilinear resize where the sizes do. M is 0 with probability `ratio`, drawn anew
    for every sample and position (or channel), else 1. Maps (B, C, H, W), or tokens of a square
    grid.
    """

    name = "mgd"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        ratio: float = Field(
            default=0.5,
            ge=0,
            lt=1,
            description="How much of the student's map is hidden, lambda in the paper.",
        )
        mask: Literal["positions", "channels"] = Field(
            default="positions", description="Whether positions are hidden, or whole channels."
        )

    options: Options
    aligns: nn.ModuleList
    generators: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.aligns, self.generators = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            width = f_t.shape[1]
            self.aligns.append(kdkit.aligned(f_s, f_t))
            self.generators.append(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1),
                )
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for align, generate, (f_s, f_t) in zip(
            self.aligns, self.generators, self.options.pairs(student, teacher), strict=True
        ):
            # aligned before it is masked: the convolution's bias would fill the holes
            f_s = kdkit.resized(align(f_s), f_t.shape[2:])
            n, channels, height, width = f_s.shape
            shape = (
                (n, 1, height, width) if self.options.mask == "positions" else (n, channels, 1, 1)
            )
            shown = torch.rand(shape, device=f_s.device) >= self.options.ratio
            # a sum over the map, as in the released code, which is why usual weights are small
            errors.append((generate(f_s * shown) - f_t).square().sum() / n)
        return torch.stack(errors).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [MaskedGeneration]
