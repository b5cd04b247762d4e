"""Wasserstein distillation of features (WKD-F): in each part of a map, the student's channels have
the mean and the deviation that the teacher's have.

Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
NeurIPS 2024, arXiv:2412.08139, section 3.2: the squared distance of two Gaussians of diagonal
covariance. Reduction, cells and the 1e-5 under the root are those of the released code. There the
weight is 0.08 on CIFAR-100 (grid 1, and a mean ratio of 4 for ResNet32x4 as teacher), which goes to
0 by a cosine from epoch 150 of 240 on, and 0.02 on ImageNet (grid 4, a bottleneck of 256), falling
so from the beginning; the cross-entropy's is 1. In that code a cell of one pixel has a variance of
0 / 0; here it is 0. It brings the student's map to the size of the teacher's first, which cells of
means and deviations do not need.
"""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class WassersteinFeatures(kdkit.Loss):
    """Squared differences of the channels' means and deviations, cell by cell.

    Formula: (1 / grid^2) * sum over cells and channels of mean_ratio * (m_s - m_t)^2 + (d_s -
    d_t)^2, mean over the batch, then over the layer pairs

    m is a channel's mean over the positions of a cell, d = sqrt(unbiased variance + 1e-5) its
    deviation; s is r(f_s), t is f_t. The cells are those of adaptive pooling to grid x grid, which
    overlap where the sides are no multiples. r is a 1x1 convolution, batch normalisation and ReLU,
    or, with `bottleneck`, a 1x1, a 3x3 and a 1x1 convolution, each so. Maps (B, C, H, W) of any
    sizes, or tokens of a square grid. It suits teacher layers behind a ReLU.
    """

    name = "wkd_feature"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        grid: int = Field(
            default=1,
            ge=1,
            le=16,
            description="Cells along each side; 1 compares the statistics of whole maps.",
        )
        mean_ratio: kdkit.Rampable = Field(
            default=2.0, ge=0, description="Factor of the means, gamma in the paper."
        )
        bottleneck: int = Field(
            default=0,
            ge=0,
            description="Inner width of a projector of three convolutions; 0: one convolution.",
        )

    options: Options
    projectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.projectors = nn.ModuleList(
            projector(f_s.shape[1], f_t.shape[1], self.options.bottleneck)
            for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        distances = []
        for project, (f_s, f_t) in zip(
            self.projectors, self.options.pairs(student, teacher), strict=True
        ):
            mean_s, deviation_s = statistics(project(f_s), self.options.grid)
            mean_t, deviation_t = statistics(f_t, self.options.grid)
            of_means = (mean_s - mean_t).square()
            of_deviations = (deviation_s - deviation_t).square()
            each = self.options.mean_ratio * of_means + of_deviations
            # a sum over the channels, as in the released code, which is why usual weights are small
            distances.append(each.sum(2).mean())
        return torch.stack(distances).mean()


def projector(width: int, wanted: int, bottleneck: int) -> nn.Sequential:
    """From maps of one number of channels to those of another."""
    if not bottleneck:
        return nn.Sequential(*block(width, wanted, 1))
    return nn.Sequential(
        *block(width, bottleneck, 1),
        *block(bottleneck, bottleneck, 3),
        *block(bottleneck, wanted, 1),
    )


def block(width: int, wanted: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, wanted, kernel, padding=kernel // 2, bias=False),
        kdkit.AnyBatchNorm(wanted),
        nn.ReLU(),
    ]


def statistics(f: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation (cells, B, C) of each channel of maps (B, C, H, W) in each cell."""
    means, variances = [], []
    for cell in cells(f, grid):
        mean = cell.mean((2, 3), keepdim=True)
        # a single pixel has no variance: 0 / 1, not 0 / 0
        count = max(cell.shape[2] * cell.shape[3] - 1, 1)
        means.append(mean.flatten(1))
        variances.append((cell - mean).square().sum((2, 3)) / count)
    return torch.stack(means), (torch.stack(variances) + 1e-5).sqrt()


def cells(f: Tensor, grid: int) -> Iterator[Tensor]:
    """Yield the windows of adaptive pooling, row by row."""
    height, width = f.shape[2:]
    for i in range(grid):
        for j in range(grid):
            rows = slice(i * height // grid, -(-(i + 1) * height // grid))
            yield f[:, :, rows, j * width // grid : -(-(j + 1) * width // grid)]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [WassersteinFeatures]
