"""Accumulates the values of every loss term, transfers them from the device in bulk, and reports
non-finite ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkit.engine.objective import Value
from kdkit.errors import RunError

Terms = dict[str, float]


class Meter:
    """Terms of each optimizer step: `loss` (the total), NAME unweighted, NAME.weighted; with
    several students, NAME@1, NAME@2...
    """

    def __init__(self) -> None:
        self._sums: Terms = {}
        self._counts: dict[str, int] = {}
        self._moving: set[str] = set()  # terms that were ever non-zero
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, values: Sequence[Value], students: int) -> None:
        """Add the values of one optimizer step (one per student and accumulated batch, batch by
        batch); nothing is transferred yet.
        """
        by_student = [values[i::students] for i in range(students)]
        totals = [
            _mean([(value.total.detach(), value.samples) for value in mine]) for mine in by_student
        ]
        terms: dict[str, Tensor] = {"loss": torch.stack(totals).sum()}
        for i, mine in enumerate(by_student):
            suffix = f"@{i + 1}" if students > 1 else ""
            for name in dict.fromkeys(name for value in mine for name in value.terms):
                having = [value for value in mine if name in value.terms]
                terms[name + suffix] = _mean(
                    [(value.terms[name], value.samples) for value in having]
                )
                terms[f"{name}{suffix}.weighted"] = _mean(
                    [(value.weighted[name], value.samples) for value in having]
                )
        self._waiting.append((step, terms))

    def read(self) -> Terms:
        """Transfer the pending values at once; return the last step's terms.

        Raises:
            RunError: a term is not finite; names the step, the term and its value.
        """
        found: Terms = {}
        if not self._waiting:
            return found
        numbers = iter(
            torch.stack(
                [value.float() for _, terms in self._waiting for value in terms.values()]
            ).tolist()
        )
        waiting, self._waiting = self._waiting, []
        for step, terms in waiting:
            # not strict: `numbers` is one iterator over the terms of all steps
            found = dict(zip(terms, numbers, strict=False))
            _refuse_non_finite(step, found)
            for name, value in found.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
            self._moving.update(name for name, value in found.items() if value != 0)
        return found

    def means(self) -> Terms:
        """Return the mean of each term over the steps read so far that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def silent(self) -> list[str]:
        """List the terms that were exactly zero at every step: nothing is learnt from them."""
        return [
            name
            for name in self._sums
            if name not in self._moving and not name.endswith(".weighted")
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts, "moving": sorted(self._moving)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])
        self._moving = set(state["moving"])


def _mean(values: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Compute the mean over the samples of several batches, each given as (mean over the batch, its
    size).
    """
    if len(values) == 1:
        return values[0][0]
    samples = sum(size for _, size in values)
    return torch.stack([value * (size / samples) for value, size in values]).sum()


def _refuse_non_finite(step: int, terms: Mapping[str, float]) -> None:
    bad: Iterable[str] = (
        name
        for name in sorted(terms, key=lambda name: name == "loss")
        if not math.isfinite(terms[name])
    )
    if (name := next(iter(bad), None)) is not None:
        raise RunError(
            f"step {step}: {'the sum of the losses' if name == 'loss' else name} is {terms[name]}"
        )
