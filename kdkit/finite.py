"""Detection of NaN and infinity in weights and answers, and their form in JSON files."""

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
MEASURED = {"test", "validation", "teacher", "ensemble"}  # keys of metrics in a run's files


def faulty_weight(module: nn.Module) -> str | None:
    """Describe a weight that is not finite; None if all are.

    A buffer may hold minus infinity, as attention masks do.
    """
    masks = {name for name, _ in module.named_buffers()}
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not value.is_floating_point():
            continue
        sound = value.isfinite() | value.isneginf() if name in masks else value.isfinite()
        if count := int((~sound).sum()):
            return f"{name} holds {count:,} of {value.numel():,} numbers that are NaN or infinite"
    return None


class FiniteAnswers:
    """Records on the device, without synchronisation, whether a network's answers are finite.

    Args:
        role: name of the network in messages.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self._finite: dict[str, Tensor] = {}  # by output: the logits, or a layer

    def note(self, answer: Mapping[str, Tensor]) -> None:
        """Record whether one answer is finite."""
        for name, value in answer.items():
            if value.device.type == "meta" or not value.is_floating_point():
                continue
            # stays on the device: `bool()` would synchronise in every step
            finite = value.detach().isfinite().all()
            if name in self._finite:
                # in place, as a recorded step writes to the same memory each time
                self._finite[name] &= finite
            else:
                self._finite[name] = finite

    def verify(self) -> None:
        """Raise an error if a recorded answer was not finite.

        Raises:
            RunError: an answer was not finite; names the network and what it said.
        """
        if not self._finite:
            return
        # one stack, so that the device is read once however many outputs there are
        flags = torch.stack(list(self._finite.values())).tolist()
        faulty = [name for name, finite in zip(self._finite, flags, strict=True) if not finite]
        if faulty:
            says = f"its answers hold NaN or infinite numbers ({', '.join(faulty)})"
            raise RunError(f"{self.role}: {says}; {LOOK}")


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Convert plain values to JSON. NaN and infinity, which JSON cannot express, become null."""
    return json.dumps(without_nan(content), indent=indent, default=str, allow_nan=False)


def without_nan(value: Any) -> Any:
    """Return plain values with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def or_nan(value: Any) -> Any:
    """Convert a number that was read from JSON: null becomes NaN again."""
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(or_nan)]
"""A float that pydantic reads from JSON; null stands for NaN."""


def with_nan(content: Any) -> Any:
    """Convert content that was read from JSON: null becomes NaN again in measured numbers."""
    return json.loads(json.dumps(content), object_hook=metrics_with_nan)


def metrics_with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Convert null to NaN in measured numbers, as an object hook of `json.loads`."""
    for key in MEASURED & values.keys():
        # the whole entry is null where there is no teacher or no ensemble
        if isinstance(values[key], dict):
            values[key] = {name: or_nan(value) for name, value in values[key].items()}
    return values
