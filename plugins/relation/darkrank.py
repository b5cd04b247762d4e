"""DarkRank: the samples nearest to each one come in the teacher's order.

Chen, Wang, Zhang, "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities
Transfer", AAAI 2018, arXiv:1707.01220, its hard transfer (ListMLE); with Euclidean scores, the
nearest four and the mean over the batch as in the code that the authors of relational distillation
(arXiv:1904.05068) released. There, embeddings had unit length: `normalize` for others, such as a
classifier's. Where a score's slope exceeds 1e5 (with alpha and beta 3, from a distance of 105 on),
it goes on along its tangent. The ranks' logarithms come from log_softmax over each tail: what
cancels in large scores does not in their differences.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

STEEPEST = 1e5


class DarkRank(kdkit.Loss):
    """Negative log-likelihood, under the student, of the teacher's order of each sample's
    nearest neighbours.

    Formula: -sum_k log(exp(s_k) / sum_{l >= k} exp(s_l)) with s_k = -alpha * |f_i - f_pi(k)|^beta,
    mean over the samples i, in nats, then over the layer pairs

    pi orders the `length` samples that the teacher has nearest to i, nearest first. Embeddings (B,
    D), larger features flattened to that; the two models' sizes need not agree. Fewer than three
    samples have one order only: the value is 0.
    """

    name = "darkrank"
    knowledge = "relation"

    class Options(kdkit.RelationOptions):
        alpha: kdkit.Rampable = Field(
            default=3.0,
            gt=0,
            le=100,
            description="Factor of the scores; a larger one is surer of the order.",
        )
        beta: kdkit.Rampable = Field(
            default=3.0, ge=1, le=8, description="Power of the distances in the scores."
        )
        length: int = Field(
            default=4, ge=2, le=64, description="How many of the nearest samples are ranked."
        )
        normalize: bool = Field(
            default=False,
            description="Give embeddings unit length first, which alpha and beta suit best.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        return torch.stack(
            [self.surprise(*pair) for pair in self.options.pairs(student, teacher)]
        ).mean()

    def surprise(self, e_s: Tensor, e_t: Tensor) -> Tensor:
        """Embeddings (N, D_s) and (N, D_t) to the mean negative log-likelihood."""
        if self.options.normalize:
            e_s, e_t = unit(e_s), unit(e_t)
        length = min(self.options.length, len(e_s) - 1)
        if length < 2:
            # not a plain zero: backward needs a graph
            return 0.0 * e_s.sum()
        itself = torch.eye(len(e_t), dtype=torch.bool, device=e_t.device)
        # each sample is nearest to itself, which says nothing
        nearest = distances(e_t).masked_fill(itself, math.inf).topk(length, largest=False).indices
        scores = self.scores(distances(e_s).gather(1, nearest))
        # before k, when k is drawn
        ranked = torch.ones(length, length, dtype=torch.bool, device=e_s.device).tril(-1)
        tails = scores[:, None].expand(-1, length, -1).masked_fill(ranked, -math.inf)
        return -F.log_softmax(tails, dim=2).diagonal(dim1=1, dim2=2).sum(1).mean()

    def scores(self, d: Tensor) -> Tensor:
        alpha, beta = self.options.alpha, self.options.beta
        # with beta 1 the slope is alpha everywhere
        far = (STEEPEST / (alpha * beta)) ** (1 / (beta - 1)) if beta > 1 else math.inf
        return -alpha * d.clamp_max(far) ** beta - STEEPEST * (d - far).clamp_min(0.0)


def unit(e: Tensor) -> Tensor:
    """Rows of length 1; those shorter than 1e-6 are zero, without gradient."""
    return F.normalize(e.masked_fill(e.detach().norm(dim=1, keepdim=True) < 1e-6, 0.0))


def distances(e: Tensor) -> Tensor:
    """Embeddings (N, D) to Euclidean distances, (N, N)."""
    # changes no distance, and saves digits of the Gram matrix
    e = e - e.detach().mean(0)
    gram = e @ e.T
    square = gram.diagonal()
    # clamp before the root, whose slope at 0 is infinite: equal samples have no gradient
    return (square[:, None] + square - 2 * gram).clamp_min(1e-12).sqrt()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DarkRank]
