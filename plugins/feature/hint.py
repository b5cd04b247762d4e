"""Hints: a small regressor on the student's features predicts the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, eq. 3. The paper has
half the squared norm per sample and a valid convolution as large as the difference in size; this is
the plain mean over all elements, with the regressor of later public benchmarks (batch normalisation
and ReLU after it). It suits teacher layers after a ReLU; for others take `adapter: linear`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Hint(kdkit.Loss):
    """Mean squared error of the teacher's features, predicted from the student's by a learnt
    regressor r.

    Formula: (r(f_s) - f_t)^2, mean over all elements, then over the layer pairs

    Maps (B, C, H, W): r is a convolution, then batch normalisation and ReLU: 1x1 where the sizes
    agree, 3x3 with stride 2 where the student's is twice the teacher's (odd sizes rounded up), 4x4
    transposed with stride 2 where it is half, 1x1 and a bilinear resize at the end elsewhere. With
    `adapter: linear`, r is a 1x1 convolution alone, resized likewise. Tokens (B, N, D), equally
    many on both sides, and vectors (B, D): r is a linear layer. Tokens and a map, or unequally many
    tokens, are compared as maps.
    """

    name = "hint"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        adapter: Literal["regressor", "linear"] = Field(
            default="regressor",
            description=(
                "What predicts maps: `regressor`, a convolution by size, batch norm and ReLU; or"
                " `linear`, a bare 1x1 convolution."
            ),
        )

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            # tokens or vectors: one linear layer serves both, as it takes the last dimension
            if f_s.ndim < 4:
                self.adapters.append(nn.Linear(f_s.shape[-1], f_t.shape[-1]))
            elif self.options.adapter == "linear":
                self.adapters.append(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1))
            else:
                # the convolutions have no bias, which batch normalisation would take away
                self.adapters.append(
                    nn.Sequential(
                        convolution(f_s, f_t), kdkit.AnyBatchNorm(f_t.shape[1]), nn.ReLU()
                    )
                )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for adapter, (f_s, f_t) in zip(
            self.adapters, self.options.pairs(student, teacher), strict=True
        ):
            guess = adapter(f_s)
            guess = kdkit.resized(guess, f_t.shape[2:]) if guess.ndim == 4 else guess
            errors.append(F.mse_loss(guess, f_t))
        return torch.stack(errors).mean()


def convolution(f_s: Tensor, f_t: Tensor) -> nn.Module:
    """From the student's channels to the teacher's, and to its size where that is the same, half
    or double.
    """
    sizes = list(zip(f_s.shape[2:], f_t.shape[2:], strict=True))
    if all(s == t for s, t in sizes):
        return nn.Conv2d(f_s.shape[1], f_t.shape[1], 1, bias=False)
    if all((s + 1) // 2 == t for s, t in sizes):
        return nn.Conv2d(f_s.shape[1], f_t.shape[1], 3, stride=2, padding=1, bias=False)
    if all(2 * s == t for s, t in sizes):
        return nn.ConvTranspose2d(f_s.shape[1], f_t.shape[1], 4, stride=2, padding=1, bias=False)
    # any other ratio: `forward` resizes what it gives
    return nn.Conv2d(f_s.shape[1], f_t.shape[1], 1, bias=False)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Hint]
