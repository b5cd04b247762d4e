"""Weights from learnt uncertainty: a loss that stays large is taken for noisy, and counts less.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
Semantics", CVPR 2018, arXiv:1705.07115, section 3, in the common form with one logarithm of a
variance for each loss, whatever its kind.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class Uncertainty(kdkit.Balance):
    """Divides each loss by a variance that learns with the network.

    Formula: minimises sum_i exp(-s_i) L_i + s_i over the network and s; s_i descends with steps of
    `lr`

    L_i are the recipe's weighted losses. At its minimum over s a loss weighs 1 / L_i, so that all
    count alike; a loss below 0 has none, and its s_i is held within `most`.
    """

    name = "uncertainty"

    class Options(kdkit.BalanceOptions):
        lr: float = Field(default=0.01, gt=0, le=1, description="Step of the logarithms s_i.")
        most: float = Field(default=7.0, gt=0, le=20, description="Largest |s_i|.")

    options: Options
    logarithms: Tensor

    def __init__(self, options: Any, sizes: kdkit.Sizes) -> None:
        super().__init__(options, sizes)
        self.register_buffer("logarithms", torch.zeros(len(sizes.terms)))

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        weights = self.factors()
        slope = 1 - weights * gradients.values.float()
        moved = self.logarithms - self.options.lr * slope
        moved = moved.clamp(-self.options.most, self.options.most)
        # a loss that is not there has no uncertainty to learn
        there = gradients.reached.any(1)
        self.logarithms.copy_(torch.where(there, moved, self.logarithms))
        return weights @ gradients.rows

    def factors(self) -> Tensor:
        return torch.exp(-self.logarithms)


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [Uncertainty]
