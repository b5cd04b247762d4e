"""Numbers that are NaN or infinite: found in networks and in their answers, and kept out of JSON
files.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from kdkit.errors import RunError

LOOK = "look at its weights, at the range of its inputs (`normalize`) and at its `precision`"
MEASURED = {"test", "validation", "teacher", "ensemble"}  # what has metrics in a run's files


def faulty_weight(module: nn.Module) -> str | None:
    """A weight that is not finite, in words; None where all are.

    A buffer may hold minus infinity, as attention masks do.
    """
    masks = {name for name, _ in module.named_buffers()}
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not value.is_floating_point():
            continue
        faulty = ~(value.isfinite() | value.isneginf()) if name in masks else ~value.isfinite()
        if count := int(faulty.sum()):
            return f"{name} holds {count:,} of {value.numel():,} numbers that are NaN or infinite"
    return None


class FiniteAnswers:
    """Notes on the device whether a network's answers are finite, so that nothing waits until
    someone asks.

    Args:
        role: how messages call the network.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self._finite: dict[str, Tensor] = {}  # by what it says: the logits, or a layer

    def note(self, answer: Mapping[str, Tensor]) -> None:
        """Look at one answer."""
        for name, value in answer.items():
            if value.device.type == "meta" or not value.is_floating_point():
                continue
            finite = value.detach().isfinite().all()
            self._finite[name] = self._finite[name] & finite if name in self._finite else finite

    def verify(self) -> None:
        """Look at what was noted.

        Raises:
            RunError: an answer was not finite; names the network and what it said.
        """
        if not self._finite:
            return
        names, found = list(self._finite), torch.stack(list(self._finite.values())).tolist()
        if faulty := [name for name, finite in zip(names, found, strict=True) if not finite]:
            raise RunError(
                f"{self.role}: its answers hold NaN or infinite numbers ({', '.join(faulty)});"
                f" {LOOK}"
            )


def to_json(content: Any, *, indent: int | None = None) -> str:
    """JSON of plain values. NaN and infinity, for which JSON has no words, become null."""
    return json.dumps(without_nan(content), indent=indent, default=str, allow_nan=False)


def without_nan(value: Any) -> Any:
    """Plain values, with None in the place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def or_nan(value: Any) -> Any:
    """What was read from JSON; null, which stands for no number, is NaN again."""
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(or_nan)]
"""A float that pydantic reads from JSON; null stands for NaN."""


def with_nan(content: Any) -> Any:
    """What was read from JSON; of what was measured, a number that is null is NaN again."""
    return json.loads(json.dumps(content), object_hook=metrics_with_nan)


def metrics_with_nan(found: dict[str, Any]) -> dict[str, Any]:
    """For `json.loads(object_hook=...)`: of what was measured, a number that is null is NaN
    again.
    """
    for part in MEASURED & found.keys():
        if isinstance(found[part], dict):
            found[part] = {name: or_nan(value) for name, value in found[part].items()}
    return found
