"""Keeps the values of every loss term, reads them off the device in bulk, and notices what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdkit.errors import RunError
from kdkit.objective import Value

Terms = dict[str, float]


class Meter:
    """Terms per optimizer step: `loss` (the total), NAME unweighted, NAME.weighted; with several students, NAME@1, NAME@2..."""

    def __init__(self, means: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.sums = {name: mean * steps for name, mean in (means or {}).items()}
        self.steps = steps
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, values: Sequence[Value], students: int) -> None:
        """Take the values of one optimizer step (one per student and accumulated batch); nothing is read yet."""
        rounds = len(values) // students
        terms: dict[str, Tensor] = {"loss": torch.stack([value.total.detach() for value in values]).sum() / rounds}
        for position in range(students):
            mine = values[position::students]
            suffix = f"@{position + 1}" if students > 1 else ""
            for name in mine[0].terms:
                terms[name + suffix] = _mean([value.terms[name] for value in mine])
                terms[f"{name}{suffix}.weighted"] = _mean([value.weighted[name] for value in mine])
        self._waiting.append((step, terms))

    def read(self) -> Terms:
        """Read what waits, in one transfer; give the last step's terms.

        Raises:
            RunError: a term is not finite; names the step, the term and its value.
        """
        if not self._waiting:
            return {}
        names = list(self._waiting[-1][1])
        table = torch.stack([torch.stack([terms[name].float() for name in names]) for _, terms in self._waiting]).tolist()
        steps = [step for step, _ in self._waiting]
        self._waiting.clear()
        for step, row in zip(steps, table, strict=True):
            found = dict(zip(names, row, strict=True))
            if bad := [f"{name} = {value}" for name, value in found.items() if not math.isfinite(value) and name != "loss"]:
                raise RunError(f"step {step}: {bad[0]} is not finite")
            if not math.isfinite(found["loss"]):
                raise RunError(f"step {step}: the sum of the losses is {found['loss']}")
            for name, value in found.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps += 1
        return found

    def means(self) -> Terms:
        """Means over the steps read so far."""
        return {name: total / self.steps for name, total in self.sums.items()}

    def silent(self) -> list[str]:
        """Terms that were exactly zero at every step: nothing is learnt from them."""
        return [name for name, total in self.sums.items() if total == 0 and not name.endswith(".weighted")]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()
