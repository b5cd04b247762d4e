"""Embeddings and patch tokens without labels: a projector on the student's predicts the teacher's.

So students of vision foundation models learn from images alone: Ye et al., "Accessing Vision
Foundation Models via ImageNet-1K" (Proteus), ICLR 2025, arXiv:2407.10366, objectives on the class
token and on all tokens, without its masked view; and Lightly's LightlyTrain. The projector is left
behind when the student is exported.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Embedding(kdkit.Loss):
    """Cosine distance or mean squared error between the teacher's embeddings and those that a
    learnt projector p makes of the student's.

    Formula: 1 - cos(p(f_s), f_t), or (p(f_s) - f_t)^2 in the mean over dimensions; mean over
    samples and positions, then over the layer pairs

    Vectors (B, D), such as `penultimate`; tokens (B, N, D), equally many on both sides, class token
    included; or maps (B, C, H, W), where the student's is resized to the teacher's grid. Tokens and
    a map, or unequally many tokens, are compared as maps. p is a linear layer on the channels, or
    with `hidden` linear, layer norm, GELU, linear.
    """

    name = "embedding"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            default=(kdkit.LayerPair(student="penultimate", teacher="penultimate"),),
            min_length=1,
            description="Student/teacher layer pairs to compare.",
        )
        distance: Literal["cosine", "mse"] = Field(
            default="cosine",
            description="cosine: length does not count; mse: mean squared error.",
        )
        hidden: int | None = Field(
            default=None,
            ge=1,
            le=65536,
            description=(
                "Width of a hidden layer, with layer norm and GELU, in the projector (default: the"
                " projector is one linear layer)."
            ),
        )

    options: Options
    projectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.projectors = nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            # channels are the last dimension but in maps
            channels = 1 if f_s.ndim == 4 else -1
            self.projectors.append(self.projector(f_s.shape[channels], f_t.shape[channels]))

    def projector(self, inside: int, outside: int) -> nn.Module:
        """From the student's width to the teacher's."""
        hidden = self.options.hidden
        if hidden is None:
            return nn.Linear(inside, outside)
        return nn.Sequential(
            nn.Linear(inside, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outside)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for projector, (f_s, f_t) in zip(
            self.projectors, self.options.pairs(student, teacher), strict=True
        ):
            if f_s.ndim == 4:
                f_s = kdkit.resized(f_s, f_t.shape[2:]).movedim(1, 3)
                f_t = f_t.movedim(1, 3)
            guess = projector(f_s)
            if self.options.distance == "mse":
                errors.append(F.mse_loss(guess, f_t))
            else:
                errors.append(1 - cosines(guess, f_t).mean())
        return torch.stack(errors).mean()


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines over the last dimension."""
    # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
    return (F.normalize(x, dim=-1, eps=1e-4) * F.normalize(y, dim=-1, eps=1e-4)).sum(-1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Embedding]
