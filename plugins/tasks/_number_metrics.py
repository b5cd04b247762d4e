"""Torchmetrics objects of numbers, apart from the task: they take long to import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric


def mean_absolute_error(outputs: int = 1) -> Any:
    """Mean absolute error in double precision: of all numbers, or of each output (D,)."""
    return MeanAbsoluteError(num_outputs=outputs).set_dtype(torch.float64)


def root_mean_squared_error() -> Any:
    """Root of the mean squared error, in double precision."""
    return MeanSquaredError(squared=False).set_dtype(torch.float64)


class R2(Metric):
    """Coefficient of determination, mean over the outputs whose targets vary; NaN if none does.

    Torchmetrics' own object calls an output constant if its squares sum to less than 1e-4, which
    depends on the unit of the numbers, and refuses a single sample.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    errors: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("total", "squares", "errors"):
            self.add_state(name, torch.zeros(outputs, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answer: Tensor, target: Tensor) -> None:
        self.count += len(target)
        self.total += target.sum(0)
        self.squares += target.square().sum(0)
        self.errors += (answer - target).square().sum(0)

    def compute(self) -> Tensor:
        spread = self.squares - self.total.square() / self.count
        # what remains of equal numbers is rounding
        varies = spread > 1e-12 * self.squares
        return (1 - self.errors / spread.where(varies, torch.nan)).nanmean()
