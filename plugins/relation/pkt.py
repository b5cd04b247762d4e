"""Probabilistic knowledge transfer: to each sample, the others are as probable neighbours as
they are to the teacher.

Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
arXiv:1803.10837, section 3, with the cosine kernel; the constant 1e-7 and the mean over all N^2
pairs as in the released code. That code divides by the norm of a zero row and overwrites the NaN,
but not its gradient. Here such a row has cosine 0 to all and no gradient, as has one with a norm
below 1e-6.
"""

import torch
from torch import Tensor

import kdkit

EPS = 1e-7


class ProbabilisticTransfer(kdkit.Loss):
    """KL divergence between the two models' probabilities that one sample is another's
    neighbour.

    Formula: t_ij * log((t_ij + 1e-7) / (s_ij + 1e-7)), mean over all N^2 pairs, in nats, then over
    the layer pairs

    s_ij = (1 + cos(f_i, f_j)) / 2, divided by its sum over j (itself included); t_ij is the same of
    the teacher. Embeddings (B, D), larger features flattened to that; the two models' sizes need
    not agree. A batch of one gives 0.
    """

    name = "pkt"
    knowledge = "relation"
    Options = kdkit.RelationOptions
    options: kdkit.RelationOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        for e_s, e_t in self.options.pairs(student, teacher):
            s, t = neighbours(e_s), neighbours(e_t)
            change = (s - t) / (t + EPS)
            near = change.abs() < 0.5  # there, log1p keeps the digits that a ratio near 1 has not
            # clamped also where it is not taken: the logarithm of a number below 0 would be NaN
            log_ratio = torch.where(
                near, change.clamp(-0.5, 0.5).log1p(), ((s + EPS) / (t + EPS)).log()
            )
            # s and t sum to the same: s - t only takes out what cancels
            values.append((s - t - t * log_ratio).mean())
        return torch.stack(values).mean()


def neighbours(e: Tensor) -> Tensor:
    """Embeddings (N, D) to the probability that j is the neighbour of i, (N, N)."""
    silent = e.detach().norm(dim=1, keepdim=True) < 1e-6
    e = e.masked_fill(silent | (len(e) < 2), 0.0)  # a single sample has no neighbours
    # the released code's constant, although rows with a norm near 0 are out already
    unit = e / (e.norm(dim=1, keepdim=True) + EPS)
    likeness: Tensor = ((1 + unit @ unit.T) / 2).clamp_min(0.0)  # rounding takes a cosine below -1
    return likeness / likeness.sum(1, keepdim=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ProbabilisticTransfer]
