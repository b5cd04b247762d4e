"""Proteus: the student has the class token and the patches of a foundation model, also of patches
that it has not seen.

Zhang, Ma, Bai, Wang, Fu, "Accessing Vision Foundation Models via ImageNet-1K", ICLR 2025,
arXiv:2407.10366, section 3: its token, feature and patch levels, each of weight 1, without labels.
Its masked view of the student is made here behind the layer that embeds patches: the student runs a
second time from there on. In the released code no image is masked by default; the paper masks half
of the images, 10 to 50 % of each. Which patches these are is drawn one by one here, not in blocks.

    - {use: proteus, layers: [{student: norm, teacher: norm}, {student: patch_embed, teacher:
      norm}]}
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Proteus(kdkit.Loss):
    """Mean squared errors of the teacher's class token, of it and the patches, and of the patches
    that the student has not seen.

    Formula: token * (h_1(c_s) - c_t)^2 + feature * (h_2([c_s; f_s]) - [c_t; f_t])^2 + patch *
    (h_3(g_s) - g_t)^2, each a mean over all of its elements

    c is the class token or, without one, the mean over the positions; f are the patches, g those of
    them that the student was not shown; each h is a layer normalisation and a linear layer. The
    last part needs a second pair: the student's layer that embeds patches, in whose output a learnt
    token takes the place of hidden ones, and the teacher's layer for the target. There an image has
    hidden patches with the probability `masked`, and of one that has, a share is hidden that lies
    evenly between those of `ratio`. Tokens (B, N, D) or maps (B, C, H, W); the student's grid is
    resized to the teacher's.
    """

    name = "proteus"
    knowledge = "feature"
    # the student runs again behind its embedding of patches
    needs_networks = True

    class Options(kdkit.MapOptions):
        token: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the class token's error."
        )
        feature: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the error of class token and patches."
        )
        patch: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the error of hidden patches."
        )
        masked: float = Field(
            default=0.5, gt=0, le=1, description="Share of the images that have hidden patches."
        )
        ratio: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
            Field(default=(0.1, 0.5), description="Least and largest share of hidden patches.")
        )

    options: Options
    heads: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        pairs, layers = list(self.options.pairs(student, teacher)), self.options.layers
        if len(pairs) > 2:
            raise kdkit.ShapeError(
                "it takes a pair of layers to compare, and one for hidden patches, not"
                f" {len(pairs)} pairs"
            )
        width, wanted = pairs[0][0].shape[1], [pairs[0][1].shape[1]] * 2
        if len(pairs) == 2:
            if context is None or pairs[1][0].shape[2:] != pairs[0][0].shape[2:]:
                raise kdkit.ShapeError(
                    f"student '{layers[1].student}' {tuple(pairs[1][0].shape)} must have the"
                    f" positions of '{layers[0].student}' {tuple(pairs[0][0].shape)}, to hide"
                    " patches in it, and `setup` needs a context with the networks"
                )
            # a function of the student, which is no part of the loss
            self.behind = context.student_rest(layers[1].student, [layers[0].student])
            self.hidden = nn.Parameter(0.02 * torch.randn(pairs[1][0].shape[1]))
            wanted.append(pairs[1][1].shape[1])
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide)) for wide in wanted
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, pair = self.options, self.options.layers[0]
        f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
        size = kdkit.as_map(f_t).shape[2:]
        c_s, c_t = summary(f_s), summary(f_t)
        all_s, all_t = (
            torch.cat([c[:, None], patches(f, size)], 1) for c, f in ((c_s, f_s), (c_t, f_t))
        )
        value = o.token * F.mse_loss(self.heads[0](c_s), c_t)
        value = value + o.feature * F.mse_loss(self.heads[1](all_s), all_t)
        # without draws, which are for training, nothing is hidden
        if len(self.heads) == 3 and self.training:
            value = value + o.patch * self._of_hidden(student, teacher)
        return value

    def _of_hidden(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> Tensor:
        """The error of what the student makes of patches that it is not shown."""
        one, two = self.options.layers
        shown = student.features[two.student]
        grid = kdkit.as_map(shown)
        mask = self._drawn(len(grid), grid.shape[2] * grid.shape[3], grid.device)
        mask = mask.reshape(len(grid), *grid.shape[2:])
        answer = self.behind(covered(shown, mask, self.hidden))
        target = kdkit.as_map(teacher.features[two.teacher])
        guess = self.heads[2](patches(answer.features[one.student], target.shape[2:]))
        wanted = F.interpolate(mask[:, None].to(guess.dtype), target.shape[2:])[:, 0].flatten(1)
        errors = (guess - kdkit.as_tokens(target)).square().mean(2)
        # where nothing is hidden: 0 / 1, not 0 / 0
        value: Tensor = (errors * wanted).sum() / wanted.sum().clamp_min(1)
        return value

    def _drawn(self, samples: int, count: int, device: torch.device) -> Tensor:
        """Which patches are hidden, (samples, count); in an image that has any, at least one."""
        least, most = self.options.ratio
        share = least + (most - least) * torch.rand(samples, 1, device=device)
        chosen = torch.rand(samples, 1, device=device) < self.options.masked
        # the second argsort makes ranks: as many are hidden as the share says
        ranks = torch.rand(samples, count, device=device).argsort(1).argsort(1)
        return chosen & (ranks < (share * count).round().clamp_min(1))


def summary(f: Tensor) -> Tensor:
    """The class token of tokens that have one, else the mean over the positions, (B, D)."""
    grid = kdkit.as_map(f)
    has_prefix = f.ndim == 3 and f.shape[1] > grid.shape[2] * grid.shape[3]
    return f[:, 0] if has_prefix else grid.mean((2, 3))


def patches(f: Tensor, size: torch.Size) -> Tensor:
    """The patches alone, of a grid of that size, as tokens."""
    return kdkit.as_tokens(kdkit.resized(kdkit.as_map(f), size))


def covered(f: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """Tokens or maps with a token in the place of those that the mask (B, H, W) hides."""
    if f.ndim == 4:
        return torch.where(mask[:, None], token[:, None, None], f)
    # prefix tokens stay
    hides = F.pad(mask.flatten(1), (f.shape[1] - mask.shape[1] * mask.shape[2], 0))
    return torch.where(hides[:, :, None], token, f)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Proteus]
