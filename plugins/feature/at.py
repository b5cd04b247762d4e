"""Attention transfer: the student's maps are strong where the teacher's are.

Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928, eq. 1 and 2. The paper's equation has the
norm of the difference; its released code, and this, the mean of the squares. Where sizes differ, the paper asks for equal ones; here
the larger map is average-pooled before attention is taken.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class AttentionTransfer(kdkit.Loss):
    """Mean squared difference of spatial attention maps of unit length.

    Formula: (A(f_s) - A(f_t))^2 with A(f) = normalise(mean_c abs(f)^p), mean over the batch and the positions, then over the layer pairs

    `normalise` divides by the L2 norm over the positions. Maps (B, C, H, W) with any number of channels; the larger one is
    average-pooled to the smaller. A map of zeros has attention 0 and no gradient.
    """

    name = "at"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        p: float = Field(default=2.0, ge=1, le=8, description="Power of the activations; a larger one looks more at the strongest.")

    options: Options

    def setup(self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None) -> None:
        for layers, (f_s, f_t) in zip(self.options.layers, self.options.pairs(student, teacher), strict=True):
            if f_s.ndim != 4 or f_t.ndim != 4:
                raise kdkit.ShapeError(
                    f"{self.name}: student '{layers.student}' {tuple(f_s.shape)} and teacher '{layers.teacher}' {tuple(f_t.shape)} must be "
                    "maps (B, C, H, W); name layers before the pooling, such as 'stage3', or use 'hint' or 'sp' for tokens and vectors"
                )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for f_s, f_t in self.options.pairs(student, teacher):
            size = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
            errors.append(F.mse_loss(attention(f_s, size, self.options.p), attention(f_t, size, self.options.p)))
        return torch.stack(errors).mean()


def attention(f: Tensor, size: tuple[int, int], p: float) -> Tensor:
    """Maps (B, C, H, W) to unit vectors over the positions, (B, size[0] * size[1])."""
    pooled = F.adaptive_avg_pool2d(f, size) if f.shape[2:] != size else f
    magnitude = pooled if p % 2 == 0 else pooled.abs()  # an even power needs no absolute value
    # activations below 1e-6 count as none, whatever p: torch's own bound, 1e-12, at p = 2
    return F.normalize(magnitude.pow(p).mean(1).flatten(1), eps=max(1e-6**p, 1e-30))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AttentionTransfer]
