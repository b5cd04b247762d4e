"""Semantic calibration: every student layer learns from all teacher layers, each sample choosing
for itself how much from which.

Chen et al., "Cross-Layer Distillation with Semantic Calibration", AAAI 2021, arXiv:2012.03236,
section 3; projections, pooling, attention and reduction as in the released code. There, queries and
keys come from rows of the N x N similarity matrix of the batch, so that the weights fit one batch
size and the order of the samples matters; here they come from each layer's pooled features, for
batches of any size.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class SemanticCalibration(kdkit.Loss):
    """Squared errors of all pairs of a student and a teacher layer, weighted by attention that
    is learnt.

    Formula: a_ij(n) * (r_ij(f_i) - f_j)^2, mean over channels and positions, sum over teacher
    layers j, mean over student layers i and n

    a_ij = softmax over j of q_i . k_j / temperature, with q and k of unit length, from the pooled
    f_i and f_j by two linear layers with a ReLU between. r_ij is a 1x1, a 3x3 and a 1x1 convolution
    with batch normalisation and ReLU between them. Maps (B, C, H, W), or tokens of a square grid;
    of two maps the larger is average-pooled to the smaller. `layers` names the layers of both
    sides, at least two of the teacher's; which of them stand in one pair does not matter.
    """

    name = "semckd"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        width: int = Field(default=16, ge=1, description="Length of the queries and keys.")
        temperature: float = Field(
            default=1.0,
            gt=0,
            description="Divides the attention's logits; a larger one spreads it.",
        )

    options: Options
    queries: nn.ModuleList
    keys: nn.ModuleList
    regressors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        ours, theirs = self.layers(student, teacher)
        if len(theirs) < 2:
            names = ", ".join(
                f"'{pair.student}' {tuple(student.features[pair.student].shape)}"
                for pair in self.options.layers
            )
            only = f"'{self.options.layers[0].teacher}' {tuple(theirs[0].shape)}"
            raise kdkit.ShapeError(
                f"student {names} cannot choose among the single teacher layer {only}; name two or"
                " more, or use `hint`"
            )
        self.queries = nn.ModuleList(embedding(f.shape[1], self.options.width) for f in ours)
        self.keys = nn.ModuleList(embedding(f.shape[1], self.options.width) for f in theirs)
        self.regressors = nn.ModuleList(
            regressor(f_s.shape[1], f_t.shape[1]) for f_s in ours for f_t in theirs
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ours, theirs = self.layers(student, teacher)
        q, k = embedded(self.queries, ours), embedded(self.keys, theirs)
        # (B, student layers, teacher layers)
        attention = (q @ k.transpose(1, 2) / self.options.temperature).softmax(2)
        pairs = [kdkit.pooled_alike(f_s, f_t) for f_s in ours for f_t in theirs]
        errors = [
            (r(f_s) - f_t).square().mean((1, 2, 3))
            for r, (f_s, f_t) in zip(self.regressors, pairs, strict=True)
        ]
        # the attention sums to 1 over teacher layers; student layers are averaged, as in the
        # released code
        return (attention.flatten(1) * torch.stack(errors, 1)).sum(1).mean() / len(ours)

    def layers(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of the student's layers and of the teacher's, each once."""
        ours, theirs = {}, {}
        # by name, so that a layer that stands in several pairs counts once
        for pair, (f_s, f_t) in zip(
            self.options.layers, self.options.pairs(student, teacher), strict=True
        ):
            ours[pair.student], theirs[pair.teacher] = f_s, f_t
        return list(ours.values()), list(theirs.values())


def embedding(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def embedded(embeddings: nn.ModuleList, maps: list[Tensor]) -> Tensor:
    """One unit vector per layer, (B, layers, width)."""
    # 1e-5 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
    return F.normalize(
        torch.stack([embed(f.mean((2, 3))) for embed, f in zip(embeddings, maps, strict=True)], 1),
        dim=2,
        eps=1e-5,
    )


def regressor(channels: int, wanted: int) -> nn.Sequential:
    wide = 2 * wanted
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, bias=False),
        kdkit.AnyBatchNorm(wide),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1, bias=False),
        kdkit.AnyBatchNorm(wide),
        nn.ReLU(),
        nn.Conv2d(wide, wanted, 1, bias=False),
    )


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SemanticCalibration]
