"""Information-theoretic distillation: units correlate with the teacher's over the batch, and
images are as alike as they are to the teacher.

Miles, Lopez Rodriguez and Mikolajczyk, "Information Theoretic Representation Distillation", BMVC
2022, arXiv:2112.00459; both parts, their weights and the order alpha as in the released code,
beside `cross_entropy` with weight 1. Its example, for a teacher and a student of one family, takes
alpha 1.01 and a weight of 1 for the second part.

That code divides by the plain deviation over the batch: a unit that does not vary makes everything
NaN. Here, 1e-6 is added to the variance, and a teacher's unit of variance below 1e-10 is left out.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._embeddings import EmbeddingOptions


class InformationTheoretic(kdkit.Loss):
    """Lack of correlation of the student's mapped units with the teacher's, and the information
    about the teacher's relations that the student's lack.

    Formula: correlation * log2 sum_d |c_d - 1|^(2 alpha) + mutual * sum_ij (G_s / N)^2 - (G_s G_t /
    N)^2, mean over the layer pairs, with c_d the mean over the batch of the product of unit d of
    both models, each standardised over the batch

    Vectors (B, D); maps are averaged over positions, sequences over tokens. The student's go
    through a learnt linear layer to the teacher's width first, in the second part only where the
    widths differ. Standardised: less the mean, over sqrt(variance + 1e-6), the variance unbiased,
    so that c_d is at most (N - 1) / N and the first part has a minimum. G_ij are the cosines of
    embeddings i and j. A batch of one gives 0.
    """

    name = "itrd"
    knowledge = "relation"

    class Options(EmbeddingOptions):
        correlation: kdkit.Rampable = Field(
            default=2.0, ge=0, description="Weight of the part on correlations of units."
        )
        mutual: kdkit.Rampable = Field(
            default=0.05, ge=0, description="Weight of the part on relations of images."
        )
        alpha: kdkit.Rampable = Field(
            default=1.5,
            ge=0.5,
            le=10,
            description="Order of the entropy: a larger one weighs badly correlated units more.",
        )

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList(
            # standardising takes a bias away: it is of use in the second part only
            nn.Linear(e_s.shape[1], e_t.shape[1], bias=e_s.shape[1] != e_t.shape[1])
            for e_s, e_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, values = self.options, []
        pairs = self.options.pairs(student, teacher)
        for adapter, (e_s, e_t) in zip(self.adapters, pairs, strict=True):
            mapped = adapter(e_s)
            alike = e_s if e_s.shape[1] == e_t.shape[1] else mapped
            values.append(
                o.correlation * decorrelation(mapped, e_t, o.alpha) + o.mutual * lacking(alike, e_t)
            )
        return torch.stack(values).mean()


def decorrelation(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """Return log2 sum_d |c_d - 1|^(2 alpha) over the units d of s and t (N, D) for which t varies;
    0 if there is none.
    """
    s, _ = standardised(s)
    t, variance = standardised(t)
    # where all of them are as large as can be, |c_d - 1| is 1 / N: the root of rounding stays away
    gaps = ((s * t).mean(0) - 1).abs().pow(2 * alpha)
    varies = variance > 1e-10
    total = (gaps * varies).sum()
    # a sum of nothing has the logarithm of 1
    return torch.where(varies.any(), total, 1.0).clamp_min(1e-30).log2()


def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return units (N, D) over their deviation over the batch, and their variances."""
    x = x - x.mean(0)
    variance = x.square().sum(0) / max(len(x) - 1, 1)
    return x / (variance + 1e-6).sqrt(), variance


def lacking(s: Tensor, t: Tensor) -> Tensor:
    """Return the second part for embeddings (N, D) of both models."""
    # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
    cosines_s, cosines_t = (x @ x.T for x in (F.normalize(x, eps=1e-4) for x in (s, t)))
    # an image is like itself, a zero embedding included: the traces are N
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    cosines_s = cosines_s.masked_fill(itself, 1.0)
    cosines_t = cosines_t.masked_fill(itself, 1.0)
    return (cosines_s.square() * (1 - cosines_t.square())).sum() / len(s) ** 2


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [InformationTheoretic]
