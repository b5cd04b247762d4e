"""An objective in words: its formula, and what its losses have to learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from kdkit.schema import LossEntry


def formula(entries: Mapping[str, LossEntry]) -> str:
    """`0.1 * cross_entropy + 1 * hint(layer2 ~ layer3, adapter linear)`: each loss with its weight, layers and options."""
    return " + ".join(f"{_short(entry.weight)} * {name}{_details(entry)}" for name, entry in entries.items())


def adapters(losses: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, int]]:
    """Name, learnable parts with the shapes of their weights, and parameters of each loss that has any."""
    for name, loss in losses.items():
        if count := sum(p.numel() for p in loss.parameters()):
            own = ((type(part).__name__, next(part.parameters(recurse=False), None)) for part in loss.modules())
            parts = [f"{kind} ({', '.join(map(str, weight.shape))})" for kind, weight in own if weight is not None]
            yield name, ", ".join(parts), count


def _details(entry: LossEntry) -> str:
    layers = [f"{pair.student} ~ {pair.teacher}" for pair in entry.taps()]
    said = [f"{key} {_short(getattr(entry, key))}" for key in entry.model_fields_set if key not in ("use", "name", "weight", "layers")]
    return f"({', '.join([*layers, *sorted(said)])})" if layers or said else ""


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
