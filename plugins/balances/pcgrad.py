"""Gradients without conflict: where two losses pull against each other, each gives up that part of
its pull.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv:2001.06782, algorithm 1.
"""

import torch
from torch import Tensor

import kdkit


class PCGrad(kdkit.Balance):
    """Adds up the losses' gradients after each was projected off those that it conflicts with.

    Formula: for each i, over the other j in random order: h_i <- h_i - min(0, <h_i, g_j>) /
    max(|g_j|^2, 1e-12) * g_j, from h_i = g_i; g = sum_i h_i

    The g_j are the losses' own gradients. Without a conflict it is their sum. With two losses the
    order is of no account.
    """

    name = "pcgrad"

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        rows = gradients.rows
        count, whole = len(rows), torch.zeros_like(rows[0])
        squares = rows.square().sum(1).clamp_min(1e-12)
        # drawn on the device: a recorded step draws anew
        orders = torch.rand(count, count, device=rows.device).argsort(1)
        for i in range(count):
            own = rows[i]
            for place in range(count):
                # a tensor as index, so that the host need not know the order
                other = orders[i, place]
                row = rows.index_select(0, other[None])[0]
                share = (own @ row).clamp_max(0) / squares.index_select(0, other[None])[0]
                # its own gradient never conflicts with it in the paper, as it is left out
                own = own - torch.where(other == i, 0.0, share) * row
            whole = whole + own
        return whole


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [PCGrad]
