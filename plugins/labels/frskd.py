"""Feature refinement by a teacher that reads the student's own stages (FRSKD).

Ji, Shin, Hwang, Park, Moon, "Refine Myself by Teaching Myself: Feature Refinement via
Self-Knowledge Distillation", CVPR 2021, arXiv:2103.08273, section 3; network, weights and
reductions as in the released code (BiFPNc, one layer). The paper's objective is `cross_entropy`
with weight 1 beside this loss. So that any sizes will do, maps grow by nearest neighbours and
shrink by adaptive max-pooling, which for halves takes the largest of two by two where the code
takes that of overlapping three by three.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class FeatureRefinement(kdkit.Loss):
    """A self-teacher refines the student's maps; the student learns from its prediction and from
    the attention of its maps.

    Formula: labels * CE(z_r, y) + soft * T^2 * KL(softmax(z_r / T) || softmax(z_s / T)) + hint *
    sum_i (A(f_i) - A(r_i))^2, mean over the batch (and the positions), with A(f) = normalise(mean_c
    f^2), CE and KL in nats

    f_i are the student's maps from shallow to deep, r_i and z_r the maps and logits that a pyramid
    makes of them: from deep to shallow, then back, each step a learnt mean of what comes in and two
    depthwise-separable convolutions. As targets r_i and z_r are constants; the pyramid learns by CE
    alone, which also reaches the student's stages, but for maps that are constant in every channel.
    Layers are maps (B, C, H, W) or tokens of a square grid, both sides of a pair the same. The
    student's own cross-entropy is not in it. Nothing of it is deployed.
    """

    name = "frskd"
    knowledge = "labels"
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_the_gradient_is_that_of_the_value": (
            "the refined maps and logits are constants where they teach"
        ),
    }

    class Options(kdkit.MapOptions):
        labels: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Weight of the self-teacher's cross-entropy on the labels.",
        )
        soft: kdkit.Rampable = Field(
            default=2.0,
            ge=0,
            description="Weight of the student's divergence from the self-teacher's prediction.",
        )
        hint: kdkit.Rampable = Field(
            default=100.0, ge=0, description="Weight of the distance of attention maps."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens both predictions; 1 leaves them as they are."
        )
        width: int = Field(
            default=2,
            ge=1,
            le=16,
            description="The self-teacher's channels are the student's times this.",
        )

    options: Options
    pyramid: "Pyramid"

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        if len(pairs := self.options.layers) < 2 or any(
            pair.student != pair.teacher for pair in pairs
        ):
            raise kdkit.ShapeError(
                "it refines two or more of the student's own maps, from shallow to deep: name each"
                " on both sides of a pair"
            )
        maps = self.maps(student)
        if maps[0].shape[2:].numel() == 1:
            shallow = f"student '{pairs[0].student}' {tuple(maps[0].shape)}"
            raise kdkit.ShapeError(
                f"{shallow} has one position, where nothing can be refined; begin with a larger map"
            )
        self.pyramid = Pyramid(
            [f.shape[1] for f in maps], self.options.width, student.logits.shape[1]
        )

    def maps(self, student: kdkit.Outputs) -> list[Tensor]:
        return [f for f, _ in self.options.pairs(student, student)]

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, maps = self.options, self.maps(student)
        refined, z = self.pyramid([kept_if_varied(f) for f in maps])
        log_p, log_q = (
            F.log_softmax(student.logits / o.temperature, 1),
            F.log_softmax(z.detach() / o.temperature, 1),
        )
        soft = o.temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        hint = torch.stack(
            [
                F.mse_loss(attention(f), attention(r.detach()))
                for f, r in zip(maps, refined, strict=True)
            ]
        ).sum()
        return o.labels * F.cross_entropy(z, batch.labels) + o.soft * soft + o.hint * hint


class Pyramid(nn.Module):
    """From maps, shallow to deep, to as many refined ones of the same sizes, `width` times as
    many channels, and logits.
    """

    def __init__(self, channels: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        wide = [c * width for c in channels]
        # of neighbours, the shallow one's channels and the deep one's
        steps = list(zip(wide, wide[1:], strict=False))
        self.lateral = nn.ModuleList(point(c, w) for c, w in zip(channels, wide, strict=True))
        self.skip = nn.ModuleList(point(c, w) for c, w in zip(channels[1:], wide[1:], strict=True))
        self.widen = nn.ModuleList(point(deep, shallow) for shallow, deep in steps)
        self.narrow = nn.ModuleList(point(shallow, deep) for shallow, deep in steps)
        self.up, self.down = (
            nn.ModuleList(separable(w) for w in some) for some in (wide[:-1], wide[1:])
        )
        self.up_shares = nn.ParameterList(torch.ones(2) for _ in steps)
        # on the way back, the deepest map has no map from the first way beside it
        self.down_shares = nn.ParameterList(
            torch.ones(3 if i < len(steps) else 2) for i in range(1, len(steps) + 1)
        )
        self.classifier = nn.Linear(wide[-1], classes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        above = [lateral(f.relu()) for lateral, f in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            grown = self.widen[i](F.interpolate(above[i + 1], size=above[i].shape[2:]))
            above[i] = self.up[i](mean(self.up_shares[i], above[i], grown)).relu()
        # nothing comes to the shallowest map on the way back
        refined = above[:1]
        for i in range(1, len(maps)):
            shrunk = self.narrow[i - 1](F.adaptive_max_pool2d(refined[-1], maps[i].shape[2:]))
            middle = above[i : i + 1] if i < len(maps) - 1 else []
            refined.append(
                self.down[i - 1](
                    mean(self.down_shares[i - 1], self.skip[i - 1](maps[i].relu()), *middle, shrunk)
                ).relu()
            )
        return refined, self.classifier(refined[-1].mean((2, 3)))


def kept_if_varied(f: Tensor) -> Tensor:
    """The map, as a constant where each channel has one value over batch and positions (variance
    below 1e-10).

    Batch normalisation multiplies the gradient of such a map by up to 316, layer after layer.
    """
    variance = f.detach().var((0, 2, 3), correction=0)
    return torch.where(variance.amax() > 1e-10, f, f.detach())


def mean(shares: Tensor, *maps: Tensor) -> Tensor:
    """Their mean by learnt shares, none negative."""
    positive = shares.relu()
    # 1e-6: all shares may be 0 behind the ReLU
    return (positive.view(-1, 1, 1, 1, 1) * torch.stack(maps)).sum(0) / (positive.sum() + 1e-6)


def point(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False), kdkit.AnyBatchNorm(width), nn.ReLU()
    )


def separable(width: int) -> nn.Sequential:
    """Two depthwise-separable convolutions, the last without activation."""

    def one() -> list[nn.Module]:
        each = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        return [each, nn.Conv2d(width, width, 1, bias=False), kdkit.AnyBatchNorm(width)]

    return nn.Sequential(*one(), nn.ReLU(), *one())


def attention(f: Tensor) -> Tensor:
    """Maps (B, C, H, W) to unit vectors over the positions, (B, H * W)."""
    # of squared activations: those below 1e-6 count as none
    return F.normalize(f.square().mean(1).flatten(1), eps=1e-12)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FeatureRefinement]
