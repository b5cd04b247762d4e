"""Attention transfer: the student's maps are strong where the teacher's are.

Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928, eq. 1 and
2. The paper's equation has the norm of the difference; its released code, and this, the mean of the
squares. Where sizes differ, the paper asks for equal ones; here the larger map is average-pooled
before attention is taken.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class AttentionTransfer(kdkit.Loss):
    """Mean squared difference of spatial attention maps of unit length.

    Formula: (A(f_s) - A(f_t))^2 with A(f) = normalise(mean_c abs(f)^p), mean over the batch and the
    positions, then over the layer pairs

    `normalise` divides by the L2 norm over the positions. Maps (B, C, H, W) with any number of
    channels, or tokens of a square grid; the larger one is average-pooled to the smaller. A map of
    zeros has attention 0 and no gradient.
    """

    name = "at"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        p: float = Field(
            default=2.0,
            ge=1,
            le=8,
            description="Power of the activations; a larger one looks more at the strongest.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for f_s, f_t in self.options.pairs(student, teacher):
            f_s, f_t = kdkit.pooled_alike(f_s, f_t)
            errors.append(
                F.mse_loss(attention(f_s, self.options.p), attention(f_t, self.options.p))
            )
        return torch.stack(errors).mean()


def attention(f: Tensor, p: float) -> Tensor:
    """Maps (B, C, H, W) to unit vectors over the positions, (B, H * W)."""
    magnitude = f if p % 2 == 0 else f.abs()  # an even power needs no absolute value
    # activations below 1e-6 count as none, whatever p: torch's own bound, 1e-12, at p = 2
    return F.normalize(magnitude.pow(p).mean(1).flatten(1), eps=max(1e-6**p, 1e-30))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AttentionTransfer]
