"""Weights that learn to let all losses train at similar rates.

Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
Networks", ICML 2018, arXiv:1711.02257, algorithm 1. Norms there are those at one shared layer; here
at all of the student's parameters. The logarithms of the weights learn, so that they stay positive.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class GradNorm(kdkit.Balance):
    """Moves weights until the norm of each loss's gradient fits how slowly it falls.

    Formula: g = sum_i w_i g_i; w descends on sum_i |w_i n_i - mean_j(w_j n_j) r_i^alpha| (the
    second term a constant), r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0)), and is then scaled to the
    mean of 1

    n_i = |g_i| over the student's parameters and L_i are those of the recipe's weighted losses,
    L_i(0) of the first step in which a loss has a value above 0.
    """

    name = "gradnorm"

    class Options(kdkit.BalanceOptions):
        alpha: float = Field(
            default=1.5,
            ge=0,
            description="How strongly losses that fall slowly are pulled; 0: equal norms.",
        )
        lr: float = Field(default=0.025, gt=0, le=1, description="Step of the weights' logarithms.")

    options: Options
    weights: Tensor
    first: Tensor

    def __init__(self, options: Any, sizes: kdkit.Sizes) -> None:
        super().__init__(options, sizes)
        self.register_buffer("weights", torch.ones(len(sizes.terms)))
        self.register_buffer("first", torch.zeros(len(sizes.terms)))

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        combined = self.weights @ gradients.rows
        there, values = gradients.reached.any(1), gradients.values.float()
        self.first.copy_(torch.where(self.first > 0, self.first, values.clamp_min(0)))
        fallen = torch.where(there, values.clamp_min(0) / self.first.clamp_min(1e-12), 0.0)
        count = there.sum().clamp_min(1)
        rate = fallen * count / fallen.sum().clamp_min(1e-12)
        weighted = self.weights * gradients.rows[:, : self.sizes.own].norm(dim=1)
        mean = (weighted * there).sum() / count
        # by the logarithm of w: the derivative of |w n - target| by w, times w
        slope = torch.sign(weighted - mean * rate**self.options.alpha) * weighted
        # in units of the mean norm, so that one rate suits losses of any scale
        moved = self.weights * torch.exp(-self.options.lr * slope / mean.clamp_min(1e-12))
        moved = torch.where(there, moved.clamp(1e-3, 1e3), self.weights)
        self.weights.copy_(moved * count / (moved * there).sum().clamp_min(1e-12))
        return combined

    def factors(self) -> Tensor:
        return self.weights


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [GradNorm]
