"""Discriminative and consistent distillation: each image's student embedding finds its teacher
embedding in the batch, and the other way round alike.

Giakoumoglou and Stathaki, "Discriminative and Consistent Representation Distillation", 2024,
arXiv:2407.11802; heads, scale and reductions as in the released code. It has weight 1 there, beside
`cross_entropy` with weight 1, and `logit_kl` with weight 1 or without it.

That code also learns a number that it adds to all similarities, which no softmax sees; it is left
out. Where the scale is not learnt, the code multiplies by 0.07, which flattens all differences;
here it stays at its start.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._embeddings import EmbeddingOptions

MOST = 10.0  # the largest scale


class DiscriminativeConsistent(kdkit.Loss):
    """Contrastive loss of student embeddings against the batch's teacher embeddings, and the
    divergence of the two directions.

    Formula: CE(softmax_j(L_ij), j = i) + alpha * KL(softmax_j(L_ji) || softmax_j(L_ij)), mean over
    the batch, in nats, then over the layer pairs, with L_ij = min(exp(tau), 10) * e_s,i . e_t,j

    e are embeddings with L2 norm 1 of vectors (B, D), by a learnt linear layer for each model; maps
    are averaged over positions, sequences over tokens. tau is learnt too; where exp(tau) is above
    10, it has no gradient. A batch of one gives 0.
    """

    name = "dcd"
    knowledge = "relation"

    class Options(EmbeddingOptions):
        alpha: kdkit.Rampable = Field(
            default=0.5, ge=0, description="Weight of the divergence of the two directions."
        )
        tau: float = Field(
            default=1.0,
            ge=-5,
            # at the largest scale it would never learn
            lt=math.log(MOST),
            description="Logarithm of the scale of the similarities, at the start.",
        )
        learn: bool = Field(default=True, description="Learn the scale.")
        size: int = Field(default=128, ge=1, description="Width of the embeddings.")

    options: Options
    parts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.parts = nn.ModuleList(
            Part(e_s.shape[1], e_t.shape[1], self.options)
            for e_s, e_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.parts, self.options.pairs(student, teacher), strict=True)
        return torch.stack([part(*pair, self.options) for part, pair in pairs]).mean()


class Part(nn.Module):
    """The heads and the scale of a layer pair."""

    def __init__(
        self, student: int, teacher: int, options: DiscriminativeConsistent.Options
    ) -> None:
        super().__init__()
        self.student = nn.Linear(student, options.size)
        self.teacher = nn.Linear(teacher, options.size)
        self.tau = nn.Parameter(torch.tensor(options.tau), requires_grad=options.learn)

    def forward(
        self, f_s: Tensor, f_t: Tensor, options: DiscriminativeConsistent.Options
    ) -> Tensor:
        # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
        e_s = F.normalize(self.student(f_s), eps=1e-4)
        e_t = F.normalize(self.teacher(f_t), eps=1e-4)
        logits = self.tau.exp().clamp(max=MOST) * (e_s @ e_t.T)
        # each image's student against the teachers, and its teacher against the students
        log_p, log_q = logits.log_softmax(1), logits.T.log_softmax(1)
        consistency = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        value: Tensor = options.alpha * consistency - log_p.diagonal().mean()
        return value


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DiscriminativeConsistent]
