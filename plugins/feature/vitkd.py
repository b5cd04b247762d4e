"""Distillation of vision transformers: the first layers' tokens are mimicked, the last layer's
are generated from masked ones.

Yang et al., "ViTKD: Practical Guidelines for ViT feature knowledge distillation", 2022,
arXiv:2209.02432, mimicking and generation; layers and reductions as in the released code. Its
factors, 3e-5 for mimicking and 3e-6 for generation, are here the recipe's weight, 3e-5, and
`generation`, the ratio of the two. It mimics the first two layers, patch tokens alone; here a class
token is mimicked too, but not generated.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class ViTKD(kdkit.Loss):
    """Squared errors of linearly mapped tokens in the first layers, and of generated tokens in
    the last.

    Formula: mimic * sum over the first layers of (l(f_s) - f_t)^2 + generation / ratio * sum of M *
    (G(hide(l(f_s))) - f_t)^2 in the last

    Sums over tokens and channels, mean over the batch. l is a linear layer where the widths differ;
    `hide` puts a learnt token in place of the share `ratio` of them, drawn anew for every sample,
    and M counts those alone; G is two 3x3 convolutions over the grid of patches, with a ReLU
    between. Two or more pairs of `layers`, shallow to deep: tokens (B, N, D), equally many on both
    sides, in the last a square grid behind any prefix tokens; or maps (B, C, H, W) of as many
    positions.
    """

    name = "vitkd"
    knowledge = "feature"

    class Options(kdkit.TokenOptions):
        mimic: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of mimicking, alpha in the paper."
        )
        generation: kdkit.Rampable = Field(
            default=0.1, ge=0, description="Factor of generation, beta in the paper."
        )
        ratio: float = Field(
            default=0.5,
            gt=0,
            lt=1,
            description="How many of the last layer's tokens are hidden, lambda in the paper.",
        )

    options: Options
    aligns: nn.ModuleList
    generator: nn.Sequential

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        pairs = list(self.options.pairs(student, teacher))
        if len(pairs) < 2:
            (f_s, f_t), needs = pairs[0], "the first are mimicked and the last is generated"
            raise kdkit.ShapeError(
                f"one pair of layers, student {tuple(f_s.shape)} and teacher {tuple(f_t.shape)}, is"
                f" too few: {needs}"
            )
        grid_s, grid_t = self.grids(student, teacher)
        if grid_s.shape[2:] != grid_t.shape[2:] or grid_s.shape[2:].numel() < 2:
            shapes = f"student {tuple(grid_s.shape)} and teacher {tuple(grid_t.shape)}"
            raise kdkit.ShapeError(
                f"the last layers' grids, {shapes}, must be of one size and have several positions;"
                " take other layers"
            )
        wide = grid_t.shape[1]
        self.aligns = nn.ModuleList(
            nn.Identity() if f_s.shape[2] == f_t.shape[2] else nn.Linear(f_s.shape[2], f_t.shape[2])
            for f_s, f_t in pairs
        )
        # zeros as in the released code: at first a hidden token is an empty one
        self.hidden = nn.Parameter(torch.zeros(1, wide, 1, 1))
        self.generator = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        *first, last = self.aligns
        pairs = self.options.pairs(student, teacher)
        mimicked = torch.stack(
            [
                (align(f_s) - f_t).square().sum()
                # not strict: the last pair is generated, not mimicked
                for align, (f_s, f_t) in zip(first, pairs, strict=False)
            ]
        ).sum()
        f_s, f_t = self.grids(student, teacher)
        # a linear layer takes the channels last
        f_s = last(f_s.movedim(1, 3)).movedim(3, 1)
        n, _, height, width = f_s.shape
        mask = hidden(n, height * width, self.options.ratio, f_s.device).view(n, 1, height, width)
        generated = (
            ((self.generator(torch.where(mask, self.hidden, f_s)) - f_t) * mask).square().sum()
        )
        value: Tensor = (
            # over `ratio`, as in the released code: only this share of the tokens counts
            self.options.mimic * mimicked + self.options.generation / self.options.ratio * generated
        ) / n
        return value

    def grids(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> tuple[Tensor, Tensor]:
        """The last layers' maps, or tokens as maps without their prefix, (B, D, H, W).

        Raises:
            ShapeError: the tokens fill no square.
        """
        pair = self.options.layers[-1]
        f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
        try:
            return kdkit.as_map(f_s), kdkit.as_map(f_t)
        except kdkit.ShapeError:
            says = (
                f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                f" {tuple(f_t.shape)}"
            )
            raise kdkit.ShapeError(
                f"{says} must be tokens (B, N, D) of a square grid, or maps, to be generated"
            ) from None


def hidden(samples: int, tokens: int, ratio: float, device: torch.device) -> Tensor:
    """Which tokens are hidden, (samples, tokens): as many in each sample, at least one and not
    all.
    """
    kept = min(max(int(tokens * (1 - ratio)), 1), tokens - 1)
    # the second argsort makes ranks: with a threshold on the draws, samples would hide unequally
    # many
    return torch.rand(samples, tokens, device=device).argsort(1).argsort(1) >= kept


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ViTKD]
