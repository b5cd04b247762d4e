"""Be your own teacher (BYOT): classifiers at the student's stages learn from the labels and from
the deepest one, its logits.

Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of Convolutional
Neural Networks via Self Distillation", ICCV 2019, arXiv:1905.08094, section 3. The paper's
objective is `cross_entropy` with weight 1, for the deepest classifier, beside this loss with labels
1 - alpha, soft alpha and hint lambda, alpha 0.3, lambda 0.03, over one exit for each stage but the
last:

    - {use: cross_entropy}
    - {use: byot, layers: [{student: stage1, teacher: stage4}, {student: stage2, teacher: stage4},
      {student: stage3, teacher: stage4}]}

Divergence from the deepest classifier is multiplied by T^2, which keeps the gradient's size; the
squared distance of features is a mean over elements. Bottlenecks halve maps by 3x3 convolutions, as
the released code's do by separable ones, and end without an activation, since the last features of
a network may be negative.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class OwnTeacher(kdkit.Loss):
    """The student's stages get a classifier each (an exit), which learns from the labels and
    from the student's own deepest answer.

    Formula: labels * CE(z_i, y) + soft * T^2 * KL(softmax(z_s / T) || softmax(z_i / T)) + hint *
    (F_i - F)^2, mean over the batch (and the elements of F), summed over the exits i, CE and KL in
    nats

    F is what the student's own layer `teacher` of a pair gives. The pair's exit makes of what its
    layer `student` gives a map F_i of the shape of F, by a bottleneck (a 1x1 convolution to a
    quarter of F's channels, a 3x3 one of stride 2 for every halving, a 1x1 one, each with batch
    normalisation), and logits z_i by pooling and a linear layer. z_s and F are constants. Layers
    are maps (B, C, H, W), tokens of a square grid, or vectors. The student's own cross-entropy is
    not in it. Exits are left out of what is deployed unless `keep` is set.
    """

    name = "byot"
    knowledge = "labels"
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_the_gradient_is_that_of_the_value": (
            "the network's own answer and last features are constants: they teach the exits"
        ),
    }

    class Options(kdkit.FeatureOptions):
        labels: kdkit.Rampable = Field(
            default=0.7, ge=0, description="Weight of the exits' cross-entropy on the labels."
        )
        soft: kdkit.Rampable = Field(
            default=0.3,
            ge=0,
            description="Weight of the exits' divergence from the student's own prediction.",
        )
        hint: kdkit.Rampable = Field(
            default=0.03,
            ge=0,
            description="Weight of the distance of the exits' features from the deepest ones.",
        )
        temperature: kdkit.Rampable = Field(
            default=3.0, gt=0, description="T: softens both predictions; 1 leaves them as they are."
        )
        keep: bool = Field(
            default=False,
            description=(
                "Deploy the exits too: the network's `answers(images)` gives the logits of all."
            ),
        )

    options: Options
    exits: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.exits = nn.ModuleList(
            Exit(f, deepest, student.logits.shape[1]) for f, deepest in self.maps(student)
        )

    def maps(self, student: kdkit.Outputs) -> Iterator[tuple[Tensor, Tensor]]:
        """What each exit reads, and the deepest features that it learns from."""
        for pair in self.options.layers:
            yield grid(student, pair.student), grid(student, pair.teacher)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, terms = self.options, []
        # a constant: the exits must not draw the deepest classifier towards them
        log_q = F.log_softmax(student.logits.detach() / o.temperature, 1)
        for leave, (f, deepest) in zip(self.exits, self.maps(student), strict=True):
            feature, z = leave(f)
            log_p = F.log_softmax(z / o.temperature, 1)
            soft = o.temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
            hint = F.mse_loss(feature, deepest.detach())
            terms.append(
                o.labels * F.cross_entropy(z, batch.labels) + o.soft * soft + o.hint * hint
            )
        return torch.stack(terms).sum()

    def deploy(self, student: nn.Module) -> nn.Module:
        return (
            WithExits(student, [pair.student for pair in self.options.layers], self.exits)
            if self.options.keep
            else student
        )


class Exit(nn.Module):
    """From a map to one of the deepest map's shape, and to logits."""

    def __init__(self, f: Tensor, deepest: Tensor, classes: int) -> None:
        super().__init__()
        channels = f.shape[1]
        wide = deepest.shape[1]
        self.size = (deepest.shape[2], deepest.shape[3])
        # a quarter of few channels would be none
        inner = max(wide // 4, 1)
        # rounded down: `forward` pools what is left
        halvings = int(
            math.log2(max(1, min(s // d for s, d in zip(f.shape[2:], self.size, strict=True))))
        )
        down = [part for _ in range(halvings) for part in block(inner, inner, 3)]
        # without the last activation, as the deepest features may be negative
        self.bottleneck = nn.Sequential(
            *block(channels, inner, 1), *down, *block(inner, wide, 1)[:-1]
        )
        self.classifier = nn.Linear(wide, classes)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        f = self.bottleneck(f)
        # what strides of 2 do not reach exactly
        f = f if tuple(f.shape[2:]) == self.size else F.adaptive_avg_pool2d(f, self.size)
        return f, self.classifier(f.mean((2, 3)))


class WithExits(nn.Module):
    """A network that gives its own logits, and by `answers` those of its exits too."""

    def __init__(self, network: nn.Module, layers: list[str], exits: nn.ModuleList) -> None:
        super().__init__()
        self.network, self.exits = network, exits
        self._layers, self._tapped = layers, kdkit.taps(network, layers)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def answers(self, images: Tensor) -> list[Tensor]:
        """The logits (B, K) of each exit in the recipe's order, then the network's own; images
        as the network takes them.
        """
        seen = self._tapped(images)
        found = [
            leave(grid(seen, layer))[1]
            for layer, leave in zip(self._layers, self.exits, strict=True)
        ]
        return [*found, seen.logits]


def grid(answer: kdkit.Outputs, layer: str) -> Tensor:
    """What a layer gives as a map; a vector is a map of one position."""
    f = answer.features[layer]
    if f.ndim == 2:
        return f[:, :, None, None]
    try:
        return kdkit.as_map(f, answer.mask)
    except kdkit.ShapeError as error:
        raise kdkit.ShapeError(
            f"student '{layer}' {tuple(f.shape)} is {error}, nor a vector; name a stage"
        ) from None


def block(channels: int, width: int, kernel: int) -> list[nn.Module]:
    stride = 2 if kernel > 1 else 1
    return [
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
        kdkit.AnyBatchNorm(width),
        nn.ReLU(),
    ]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [OwnTeacher]
