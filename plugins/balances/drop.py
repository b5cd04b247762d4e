"""Teacher dropping: a student of several teachers keeps to the one that it is furthest from, and
listens to each of the others only now and then.

Sariyildiz, Weinzaepfel, Lucas, Larlus, Kalantidis, "UNIC: Universal Classification Models via
Multi-teacher Distillation", ECCV 2024, arXiv:2408.05088, section 3.3. There a teacher is dropped
image by image; here for a whole step.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class Drop(kdkit.Balance):
    """Adds up the gradients of some losses: of the largest, and of each other with a probability.

    Formula: g = sum_i b_i g_i; b_i = 1 for the largest weighted loss and for losses on labels, else
    1 with probability 1 - `probability` and 0 otherwise, drawn in each step

    For one loss to each teacher, such as `hint` with `teacher: NAME`, whose adapter is that
    teacher's head on the student and is left behind at export. Losses are compared by their values:
    they should be alike, at weights that make them as large.
    """

    name = "drop"

    class Options(kdkit.BalanceOptions):
        probability: float = Field(
            default=0.5, ge=0, le=1, description="With which a loss that is not largest is dropped."
        )

    options: Options
    kept: Tensor
    always: Tensor

    def __init__(self, options: Any, sizes: kdkit.Sizes) -> None:
        super().__init__(options, sizes)
        self.register_buffer("kept", torch.ones(len(sizes.terms)))
        self.register_buffer("always", torch.tensor(list(sizes.labels)), persistent=False)

    @classmethod
    def refused(cls, options: Any, terms: Any, optimizer: Any) -> dict[str, str]:
        return {} if len(terms) > 1 else {"": "has only one loss to keep"}

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        values = gradients.values.float().masked_fill(self.always, -torch.inf)
        # what is not part of the step is not the largest
        values = values.masked_fill(~gradients.reached.any(1), -torch.inf)
        largest = torch.arange(len(values), device=values.device) == values.argmax()
        drawn = torch.rand(len(values), device=values.device) >= self.options.probability
        self.kept.copy_(drawn | largest | self.always)
        return self.kept @ gradients.rows

    def factors(self) -> Tensor:
        return self.kept


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [Drop]
