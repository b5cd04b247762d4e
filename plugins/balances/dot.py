"""Distillation-oriented training: the gradient of the distillation gathers more momentum than that
of the labels, and leads.

Zhao et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023, section 4. There it is an optimizer;
here the two momenta are kept by the balance, and the recipe's optimizer adds their sum to the
weights, as plain SGD without a momentum does. As in the released code, a parameter that only one
kind of loss reaches has the plain momentum, and weight decay goes with the labels. Published with
`momentum: 0.9`, `delta: 0.075` for CIFAR-100 (0.05 for Tiny-ImageNet, 0.09 for ImageNet).
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class Dot(kdkit.Balance):
    """Keeps one momentum for losses on labels, and a larger one for all others.

    Formula: v <- (mu - delta) v + g_labels + decay * p; u <- (mu + delta) u + g_others; the
    gradient is v + u

    In the first step v and u are the gradients. Where only one kind of loss reaches a parameter, mu
    takes the place of both factors. Needs the optimizer `momentum` (SGD) with a momentum and a
    weight decay of 0.
    """

    name = "dot"

    class Options(kdkit.BalanceOptions):
        momentum: float = Field(default=0.9, ge=0, lt=1, description="mu: of both, on average.")
        delta: float = Field(
            default=0.075,
            ge=0,
            lt=1,
            description="Half the difference of the two; momentum + delta is below 1.",
        )
        weight_decay: float = Field(
            default=0.0, ge=0, description="Decay of all parameters, with the labels' gradient."
        )

    options: Options
    labels: Tensor
    others: Tensor
    on_labels: Tensor

    def __init__(self, options: Any, sizes: kdkit.Sizes) -> None:
        super().__init__(options, sizes)
        for name in ("labels", "others"):
            self.register_buffer(name, torch.zeros(sizes.all))
        self.register_buffer("on_labels", torch.tensor(list(sizes.labels)), persistent=False)

    @classmethod
    def refused(cls, options: Any, terms: Any, optimizer: Any) -> dict[str, str]:
        if options.momentum + options.delta >= 1:
            return {"delta": "momentum + delta must be below 1"}
        if optimizer["name"] != "momentum":
            return {"": f"is defined for optimizer 'momentum', not for '{optimizer['name']}'"}
        kept = [key for key in ("momentum", "weight_decay") if optimizer[key]]
        if kept:
            return {
                "": f"has its own {kept[0]}; write `train.optimizer.{kept[0]}: 0`, and"
                f" `balance.{kept[0]}`"
            }
        return {}

    def forward(self, gradients: kdkit.Gradients) -> Tensor:
        o = self.options
        kinds = [(self.labels, self.on_labels, -o.delta), (self.others, ~self.on_labels, o.delta)]
        reached = [(gradients.reached & which[:, None]).any(0) for _, which, _ in kinds]
        both = reached[0] & reached[1]
        for (memory, which, change), there in zip(kinds, reached, strict=True):
            own = which.to(gradients.rows) @ gradients.rows
            # decay goes with the labels, and with the others where there are no labels
            decays = reached[0] if memory is self.labels else there & ~reached[0]
            own = own + o.weight_decay * gradients.parameters * decays
            factor = torch.where(both, o.momentum + change, o.momentum)
            memory.copy_(factor * memory + own)
        return self.labels + self.others


@kdkit.hookimpl
def kdkit_balances() -> list[type[kdkit.Balance]]:
    return [Dot]
