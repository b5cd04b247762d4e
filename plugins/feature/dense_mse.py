"""Dense regression: from the student's features at each position, the features of the teacher's
last blocks, all of them at once.

Lightly, "LightlyTrain", method `distillationv2`,
https://docs.lightly.ai/train/stable/pretrain_distill/methods/distillation.html: the last two blocks
of a vision transformer, unnormalised, with weight 1 and no other loss; the optimizer is LARS with
a learning rate of 9. The projector is linear, or has a hidden layer of 2,048 (`hidden`). Which
blocks these are is said here by `layers`: one student layer, named in each pair.

    - {use: dense_mse, layers: [{student: stage4, teacher: blocks.10}, {student: stage4, teacher:
      blocks.11}]}
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._phi_s import PhiS, moments, of_layer


class DenseMse(kdkit.Loss):
    """Mean squared error of the teacher's layers, side by side, predicted from the student's.

    Formula: (r(f_s) - f_t)^2, mean over all elements; f_t = the features of all teacher layers one
    after another at each position, f_s likewise of all student layers

    r is a learnt linear layer, with `hidden` a linear layer, layer normalisation, GELU and another
    linear layer. A layer that several pairs name counts once. Maps (B, C, H, W), of which the
    student's are resized to the teacher's; tokens (B, N, D), equally many on both sides; or vectors
    (B, D). Tokens and a map, or unequally many tokens, are compared as maps. All layers must have
    the same positions. With `standardize_teacher: phi_s` each teacher layer is rotated and scaled
    so that all its dimensions have mean 0 and variance 1 over the training images.
    """

    name = "dense_mse"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        hidden: int = Field(
            default=0,
            ge=0,
            description="Width of the projector's hidden layer; 0: the projector is linear.",
        )
        standardize_teacher: Literal["none", "phi_s"] = Field(
            default="none",
            description=(
                "`phi_s`: rotate and scale each teacher layer by PHI-S (Ranzinger 2024), so that"
                " layers and teachers of different sizes count alike."
            ),
        )

    options: Options
    projector: nn.Module
    standardize: nn.ModuleList  # one for each teacher layer, or empty

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.standardize = nn.ModuleList()
        if self.options.standardize_teacher == "phi_s":
            self.standardize.extend(self.phi_s(student, teacher, context))
        f_s, f_t = self.joined(student, teacher)
        width, wanted, hidden = f_s.shape[-1], f_t.shape[-1], self.options.hidden
        self.projector = (
            nn.Sequential(
                nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, wanted)
            )
            if hidden
            else nn.Linear(width, wanted)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        f_s, f_t = self.joined(student, teacher)
        return F.mse_loss(self.projector(f_s), f_t)

    def joined(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's layers, each side's one after another, channels last.

        Raises:
            ShapeError: they have other positions.
        """
        ours, theirs = dict[str, Tensor](), dict[str, Tensor]()
        pairs = self.options.pairs(student, teacher)
        for pair, (f_s, f_t) in zip(self.options.layers, pairs, strict=True):
            if f_s.ndim == 4:
                f_s = kdkit.resized(f_s, f_t.shape[2:]).movedim(1, 3)
                f_t = f_t.movedim(1, 3)
            # a layer that is named again has the same values
            ours.setdefault(pair.student, f_s)
            theirs.setdefault(pair.teacher, f_t)
        refuse_other_positions([*ours.values(), *theirs.values()])
        known = [*theirs.values()]
        if len(self.standardize):
            known = [part(f) for part, f in zip(self.standardize, known, strict=True)]
        return torch.cat([*ours.values()], -1), torch.cat(known, -1)

    def phi_s(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None
    ) -> list[PhiS]:
        """Return the standardisation of each teacher layer.

        Raises:
            ShapeError: there is no context, which knows the training images.
        """
        if context is None:
            raise kdkit.ShapeError(
                "`standardize_teacher` is by the teacher's answers to the training images; give"
                " setup a kdkit.Context with the teacher network and a `survey`"
            )
        pairs = zip(self.options.layers, self.options.pairs(student, teacher), strict=True)
        maps = {pair.teacher: f_t.ndim == 4 for pair, (_, f_t) in pairs}
        found = context.teacher_statistics(moments, [*maps], maps=[*maps.values()])
        return [of_layer(found, layer) for layer in maps]


def refuse_other_positions(layers: Sequence[Tensor]) -> None:
    """Refuse layers, channels last, that cannot be put side by side.

    Raises:
        ShapeError: they have other positions.
    """
    places = {tuple(f.shape[1:-1]) for f in layers}
    if len(places) > 1:
        sizes = " and ".join(" x ".join(map(str, place)) or "none" for place in sorted(places))
        raise kdkit.ShapeError(
            f"the layers have different positions, {sizes}, so that they cannot be put side by"
            " side; name teacher layers of one resolution, such as blocks of a vision transformer"
        )


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DenseMse]
