"""Gradients of a step loss by loss, for a balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdkit.contracts.balance import Balance, BalanceOptions, Gradients, Sizes
from kdkit.engine.objective import Objective, Value, without_graph


class Balancing(nn.Module):
    """Collects the gradients of each loss by itself, and combines them for the optimizers.

    A loss of one name is one term, whichever student's it is. Each costs a backward pass.

    Args:
        kind: the balance's class.
        options: of the balance.
        objectives: of the stage.
        parameters: of each student that learn: its own, and the learnable parts of its losses.
        accelerator: averages over its processes, unless each trains students of its own.
    """

    def __init__(
        self,
        kind: type[Balance],
        options: BalanceOptions,
        objectives: Sequence[Objective],
        parameters: Sequence[tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]],
        accelerator: Accelerator | None,
    ) -> None:
        super().__init__()
        losses = {name: loss for each in objectives for name, loss in each.parts().items()}
        self.terms = [*losses]
        labels = [loss.knowledge == "labels" for loss in losses.values()]
        # in tuples: parameters belong to their networks
        self._learning = tuple((*own, *parts) for own, parts in parameters)
        counts = [[sum(p.numel() for p in group) for group in pair] for pair in parameters]
        self.balances = nn.ModuleList(
            kind(options, Sizes(self.terms, labels, own, own + parts)) for own, parts in counts
        )
        self._accelerator = accelerator
        self.capturable = kind.capturable
        self._patterns: dict[tuple[bool, ...], Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        every = [p for group in self._learning for p in group]
        self._sums: list[list[Tensor | None]] = [[None] * len(every) for _ in self.terms]
        self._values: list[Tensor] = []

    def add(self, values: Sequence[Value], share: float) -> list[Value]:
        """Add a batch's gradients, times its share of the step; return the values without graphs,
        weighted as in the last step.
        """
        every = [p for group in self._learning for p in group]
        terms = {
            name: torch.stack([v.weighted[name] for v in values if name in v.weighted]).sum()
            for name in self.terms
            if any(name in v.weighted for v in values)
        }
        having = [name for name, term in terms.items() if term.requires_grad]
        for name in having:
            found = torch.autograd.grad(
                terms[name] * share, every, retain_graph=name != having[-1], allow_unused=True
            )
            place = self.terms.index(name)
            self._sums[place] = [
                old if new is None else new if old is None else old + new
                for old, new in zip(self._sums[place], found, strict=True)
            ]
        like = values[0].total
        nothing = like.new_zeros(())
        told = [terms.get(name, nothing).detach().to(like.dtype) for name in self.terms]
        self._values.append(torch.stack(told) * share)
        return [self._shown(value) for value in values]

    def combine(self) -> None:
        """Set the gradients of all parameters for the optimizers, and begin anew."""
        values, begin = torch.stack(self._values).sum(0), 0
        for balance, parameters in zip(self.balances, self._learning, strict=True):
            rows = [row[begin : begin + len(parameters)] for row in self._sums]
            begin += len(parameters)
            self._set(balance, parameters, rows, values)
        self._clear()

    def _set(
        self,
        balance: nn.Module,
        parameters: Sequence[nn.Parameter],
        rows: Sequence[Sequence[Tensor | None]],
        values: Tensor,
    ) -> None:
        with torch.no_grad():
            flat = torch.stack([_flat(row, parameters) for row in rows])
            if self._accelerator is not None and self._accelerator.num_processes > 1:
                flat = self._accelerator.reduce(flat, "mean")
                values = self._accelerator.reduce(values, "mean")
            known = _flat([p.detach() for p in parameters], parameters)
            found = balance(Gradients(flat, self._reached(rows, parameters), values, known))
            parts = found.split([p.numel() for p in parameters])
            for number, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
                # what no loss reaches is no optimizer's to change
                if any(row[number] is not None for row in rows):
                    parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def _reached(
        self, rows: Sequence[Sequence[Tensor | None]], parameters: Sequence[nn.Parameter]
    ) -> Tensor:
        """Say of each value of the parameters whether a row reaches it, (L, P)."""
        pattern = tuple(one is not None for row in rows for one in row)
        # made once, as a recorded step must not wait for the host
        if pattern not in self._patterns:
            device = parameters[0].device
            sizes = torch.tensor([p.numel() for p in parameters], device=device)
            said = torch.tensor(pattern, device=device).view(len(rows), len(parameters))
            self._patterns[pattern] = said.repeat_interleave(sizes, dim=1)
        return self._patterns[pattern]

    def _shown(self, value: Value) -> Value:
        factors = cast("Balance", self.balances[0]).factors()
        value = without_graph(value)
        if factors is None:
            return value
        places = {name: i for i, name in enumerate(self.terms)}
        weighted = {name: v * factors[places[name]] for name, v in value.weighted.items()}
        return replace(value, weighted=weighted)


def _flat(values: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Put values, or zeros where there are none, one behind the other, in full precision."""
    return torch.cat(
        [
            (torch.zeros_like(p) if value is None else value).reshape(-1).float()
            for value, p in zip(values, parameters, strict=True)
        ]
    )
