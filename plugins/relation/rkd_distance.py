"""Relational distillation, distances: the student keeps the teacher's pattern of pairwise
distances, at its own scale.

Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, eq. 5 to 7;
reductions as in the released code (mean over all N^2 ordered pairs, equal ones included). Features
are centred before the Gram matrix, which changes no distance and saves digits; a batch of one gives
0, where that code gives NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class RelationalDistance(kdkit.Loss):
    """Huber difference between the two models' matrices of pairwise distances, each divided by
    its mean.

    Formula: smooth_l1(D(f_s), D(f_t)) with D_ij = d_ij / mean of d_ij over i != j, mean over all
    N^2 pairs, then over the layer pairs

    d_ij = sqrt(max(|f_i - f_j|^2, 1e-12)) and d_ii = 0; smooth_l1 is quadratic below 1. Embeddings
    (B, D), larger features flattened to that; the two models' sizes need not agree. Equal rows have
    no gradient; a batch of one gives 0.
    """

    name = "rkd_distance"
    knowledge = "relation"
    Options = kdkit.RelationOptions
    options: kdkit.RelationOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = self.options.pairs(student, teacher)
        return torch.stack(
            [F.smooth_l1_loss(distances(e_s), distances(e_t)) for e_s, e_t in pairs]
        ).mean()


def distances(e: Tensor) -> Tensor:
    """Embeddings (N, D) to Euclidean distances over their mean, (N, N)."""
    e = e - e.detach().mean(0)
    gram = e @ e.T
    square = gram.diagonal()
    itself = torch.eye(len(e), dtype=torch.bool, device=e.device)
    # clamp before the root, whose slope at 0 is infinite, and the diagonal after it
    d = (square[:, None] + square - 2 * gram).clamp_min(1e-12).sqrt().masked_fill(itself, 0.0)
    # a batch of one has no pair: 0 / 1, not 0 / 0
    mean = d.sum() / max(len(e) * (len(e) - 1), 1)
    return d / mean.clamp_min(1e-6)  # a mean of distances never is below that, except that of none


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [RelationalDistance]
