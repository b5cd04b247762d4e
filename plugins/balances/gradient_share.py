"""Weights by shares of the gradient: a loss is given the part of the student's gradient that the
recipe asks for, whatever the scale of its values.

A share says what a weight is chosen for: how strongly a loss pulls beside the others. Kin of loss
balancing by norms of gradients (Chen et al., "GradNorm", ICML 2018, arXiv:1711.02257), without
training rates.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class GradientShare(kdkit.Balance):
    """Multiplies each loss's gradient so that its norm has a fixed share of the sum of all norms.

    Formula: g = sum_i w_i g_i, w_i = share_i * (sum_j m_j) / m_i, within [1 / limit, limit]; m_i is
    a moving average of |g_i|, the norm over the student's parameters

    The g_i have the recipe's weights; `shares` sums to 1 over the losses, and those that it leaves
    out divide the rest in proportion to their m_i. The sum of the norms stays what the weights make
    of it. A loss without a gradient keeps its weight.
    """

    name = "gradient_share"

    class Options(kdkit.BalanceOptions):
        shares: dict[str, float] = Field(
            min_length=1, description="Share of each loss, by its name; the sum is 1 at most."
        )
        smoothing: float = Field(
            default=0.9,
            ge=0,
            lt=1,
            description="Part of the moving average that is kept each step.",
        )
        limit: float = Field(
            default=1e3,
            gt=1,
            description="Largest factor of a weight; its inverse is the smallest.",
        )

    options: Options
    norms: Tensor
    weights: Tensor
    shares: Tensor

    def __init__(self, options: Any, sizes: kdkit.Sizes) -> None:
        super().__init__(options, sizes)
        self.register_buffer("norms", torch.full((len(sizes.terms),), -1.0))  # -1: not seen yet
        self.register_buffer("weights", torch.ones(len(sizes.terms)))
        shares = [options.shares.get(name, -1.0) for name in sizes.terms]
        self.register_buffer("shares", torch.tensor(shares), persistent=False)

    @classmethod
    def refused(cls, options: Any, terms: Any, optimizer: Any) -> dict[str, str]:
        unknown = [name for name in options.shares if name not in terms]
        if unknown:
            says = f"there is no loss '{unknown[0]}'; the losses are {', '.join(terms)}"
            return {"shares": says}
        total, others = sum(options.shares.values()), len(terms) - len(options.shares)
        if min(options.shares.values()) < 0 or total > 1 + 1e-6:
            return {"shares": f"are parts of 1, and come to {total:g}"}
        if not others and total < 1 - 1e-6:
            return {"shares": f"name all losses, and come to {total:g}; make them 1"}
        return {}

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        keep = self.options.smoothing
        norms = gradients.rows[:, : self.sizes.own].norm(dim=1)
        self.norms.copy_(torch.where(self.norms < 0, norms, keep * self.norms + (1 - keep) * norms))
        named = self.shares >= 0
        total, rest = self.norms.sum(), self.norms * ~named
        # what no share names divides what is left, as its own norms are to each other
        left = 1 - (self.shares * named).sum()
        shares = torch.where(named, self.shares, left * rest / rest.sum().clamp_min(1e-12))
        wanted = shares * total / self.norms.clamp_min(1e-12)
        bounded = wanted.clamp(1 / self.options.limit, self.options.limit)
        # a share of 0 switches a loss off
        bounded = torch.where(shares > 0, bounded, torch.zeros_like(bounded))
        self.weights.copy_(torch.where(self.norms > 0, bounded, torch.ones_like(bounded)))
        return self.weights @ gradients.rows

    def factors(self) -> Tensor:
        return self.weights


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [GradientShare]
