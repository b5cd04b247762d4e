"""Attention-based feature matching: each teacher layer is explained by the student layers that
it finds most alike.

Ji et al., "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching",
AAAI 2021, arXiv:2102.02973, section 3; normalisations and reductions as in the released code, which
sums over the teacher's layers. Left out is what changes no value: biases in front of a batch
normalisation, and scale and shift of the one behind the bilinear weights, which the queries' scale
and the softmax make up for. Attention maps count as none where the activations are below 1e-6.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class FeatureMatching(kdkit.Loss):
    """Squared differences of spatial attention maps of all layer pairs, weighted by attention
    that is learnt.

    Formula: a_ts(n) * (A_t(f_s) - A_t(f_t))^2, mean over the positions, sum over student and
    teacher layers, mean over the batch

    A_t is the mean square over the channels, average-pooled to the teacher layer's size, flattened,
    divided by its L2 norm. a_ts = softmax over s of (q_t . W_t k_s + p_t . p_s) / sqrt(width), with
    queries q and keys k from the pooled features by linear maps and batch normalisation, and p
    learnt positions. Maps (B, C, H, W), or tokens of a square grid. `layers` names the layers of
    both sides, at least two of the student's; which of them stand in one pair does not matter.
    """

    name = "afd"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        width: int = Field(default=128, ge=1, description="Length of the queries and keys.")

    options: Options
    queries: nn.ModuleList
    keys: nn.ModuleList
    bilinear: nn.Sequential

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        ours, theirs = self.layers(student, teacher)
        shapes = ", ".join(
            f"'{name}' {tuple(f.shape)}" for name, f in [*ours.items(), *theirs.items()]
        )
        if len(ours) < 2:
            raise kdkit.ShapeError(
                f"{shapes}: a single student layer leaves no choice; name two or more, or use `at`"
            )
        # at unit length, a map of one position is 1 whatever it holds
        if any(f.shape[2:].numel() == 1 for f in theirs.values()):
            raise kdkit.ShapeError(
                f"{shapes}: teacher layers must have several positions to attend to; take larger"
                " images or finer layers"
            )
        width = self.options.width
        self.queries = nn.ModuleList(normalised(f.shape[1], width) for f in theirs.values())
        self.keys = nn.ModuleList(
            nn.Sequential(normalised(f.shape[1], width), nn.ReLU()) for f in ours.values()
        )
        # W_t of all teacher layers in one map: one product gives the keys for each of them
        self.bilinear = normalised(width, width * len(theirs), affine=False)
        self.teacher_positions = nn.Parameter(
            nn.init.xavier_normal_(torch.empty(len(theirs), width))
        )
        self.student_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(ours), width)))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ours, theirs = (list(found.values()) for found in self.layers(student, teacher))
        k, q = embedded(self.keys, ours), embedded(self.queries, theirs)
        n, width = len(k), self.options.width
        k = self.bilinear(k.reshape(n * len(ours), width, 1, 1)).view(
            n, len(ours), len(theirs), width
        )
        bias = self.teacher_positions @ self.student_positions.T
        attention = ((torch.einsum("nstw,ntw->nts", k, q) + bias) / math.sqrt(width)).softmax(2)
        # before the loop: each student layer is compared with every teacher layer
        squares = [f.square().mean(1, keepdim=True) for f in ours]
        errors = []
        for f_t in theirs:
            size = (f_t.shape[2], f_t.shape[3])
            a_t = flat(f_t.square().mean(1, keepdim=True))
            a_s = torch.stack([flat(F.adaptive_avg_pool2d(f, size)) for f in squares], 1)
            errors.append((a_s - a_t[:, None]).square().mean(2))
        return (attention * torch.stack(errors, 1)).sum((1, 2)).mean()

    def layers(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The maps of the student's layers and of the teacher's by name."""
        ours, theirs = {}, {}
        # by name, so that a layer that stands in several pairs counts once
        for pair, (f_s, f_t) in zip(
            self.options.layers, self.options.pairs(student, teacher), strict=True
        ):
            ours[pair.student], theirs[pair.teacher] = f_s, f_t
        return ours, theirs


def normalised(channels: int, width: int, affine: bool = True) -> nn.Sequential:
    """A linear map of vectors, (B, C, 1, 1), and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False), kdkit.AnyBatchNorm(width, affine=affine)
    )


def embedded(embeddings: nn.ModuleList, maps: list[Tensor]) -> Tensor:
    """One vector per layer, (B, layers, width)."""
    return torch.stack(
        [
            embed(f.mean((2, 3), keepdim=True)).flatten(1)
            for embed, f in zip(embeddings, maps, strict=True)
        ],
        1,
    )


def flat(f: Tensor) -> Tensor:
    # the square of 1e-6, as maps are of squared activations
    return F.normalize(f.flatten(1), eps=1e-12)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FeatureMatching]
