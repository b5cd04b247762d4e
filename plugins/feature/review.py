"""Knowledge review: the student's deeper layers help its shallower ones to give the teacher's
features.

Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044, section 3:
attention-based fusion (ABF) and hierarchical context loss (HCL); layers, initial weights and
reductions as in the released code. That code takes for `width` the channels of the deepest student
layer, 512 at most. A map that is not square has the levels that fit its shorter side.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

LEVELS = (4, 2, 1)  # sizes to which HCL pools, beside the map itself


class KnowledgeReview(kdkit.Loss):
    """Hierarchical squared errors of the teacher's maps, made from the student's maps of that
    depth and of all deeper ones.

    Formula: [MSE(g, f_t) + sum over l of w_l MSE(pool_l g, pool_l f_t)] / (1 + sum of w_l), summed
    over the layer pairs

    MSE is the mean over all elements; pool_l averages to l x l for those l of 4, 2, 1 that are
    smaller than the map, with w = 1/2, 1/4, 1/8 in the order in which they are used. g comes from
    the student by fusion: a 1x1 convolution to `width` channels, to which the fused map of the next
    deeper layer is added, resized, each weighted per position by a learnt sigmoid; then resized to
    the teacher's size, and a 3x3 convolution. `layers` go from shallow to deep: maps (B, C, H, W),
    tokens of a square grid, or vectors as maps of one position.
    """

    name = "review"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        width: int = Field(default=256, ge=1, description="Channels of the fused maps.")

        def pairs(
            self, student: kdkit.Outputs, teacher: kdkit.Outputs
        ) -> Iterator[tuple[Tensor, Tensor]]:
            wanted = "two maps (B, C, H, W), tokens (B, N, D) of a square grid, or two vectors"
            return self._each(student, teacher, as_maps, wanted)

    options: Options
    fusions: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        pairs, width = list(self.options.pairs(student, teacher)), self.options.width
        deepest = len(pairs) - 1
        self.fusions = nn.ModuleList(
            Fusion(s.shape[1], width, t.shape[1], fuses=i < deepest)
            for i, (s, t) in enumerate(pairs)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = list(self.options.pairs(student, teacher))
        deeper: Tensor | None = None
        errors = []
        # the deepest first: each fusion needs the map of the next deeper one
        for fusion, (f_s, f_t) in zip(reversed(self.fusions), reversed(pairs), strict=True):
            guess, deeper = fusion(f_s, deeper, f_t.shape[2:])
            errors.append(hierarchical(guess, f_t))
        # a sum over pairs, as in the paper, where most losses average
        return torch.stack(errors).sum()


class Fusion(nn.Module):
    """ABF: from `channels` by way of `width` to `wanted` channels; `fuses` says whether there is
    a deeper layer.
    """

    def __init__(self, channels: int, width: int, wanted: int, *, fuses: bool) -> None:
        super().__init__()
        # no biases: batch normalisation would take them away
        first, last = (
            nn.Conv2d(channels, width, 1, bias=False),
            nn.Conv2d(width, wanted, 3, padding=1, bias=False),
        )
        self.inner = nn.Sequential(first, kdkit.AnyBatchNorm(width))
        self.outer = nn.Sequential(last, kdkit.AnyBatchNorm(wanted))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (first, last):
            # a = 1, as in the released code; torch's own is sqrt(5)
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, f: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """A guess of the teacher's map (of that size), and the fused map for the next shallower
        layer.
        """
        fused = self.inner(f)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            own, other = self.attention(torch.cat([fused, deeper], 1)).split(1, dim=1)
            fused = own * fused + other * deeper
        # to the teacher's size first: as in the released code, the shallower layer takes this map
        fused = F.interpolate(fused, size)
        return self.outer(fused), fused


def as_maps(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    if f_s.ndim == f_t.ndim == 2:
        return f_s[:, :, None, None], f_t[:, :, None, None]
    return kdkit.as_map(f_s), kdkit.as_map(f_t)


def hierarchical(f_s: Tensor, f_t: Tensor) -> Tensor:
    """HCL of two maps of one shape."""
    levels = [level for level in LEVELS if level < min(f_t.shape[2:])]
    # by the order of the levels in use: where 4 does not fit, 2 has the weight 1/2
    weights = [0.5 ** (i + 1) for i in range(len(levels))]
    pooled = [
        F.mse_loss(F.adaptive_avg_pool2d(f_s, level), F.adaptive_avg_pool2d(f_t, level))
        for level in levels
    ]
    return (
        F.mse_loss(f_s, f_t) + sum(w * error for w, error in zip(weights, pooled, strict=True))
    ) / (1 + sum(weights))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [KnowledgeReview]
