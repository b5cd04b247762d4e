"""What every format of an exported student shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import InputOptions
from kdkit.contracts.task import Task
from kdkit.models.seen import SeenInput
from kdkit.models.tapped import TappedModel


@dataclass(frozen=True)
class Export:
    """The written files, and notes on them, a sentence each."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def named_outputs(task: Task, info: DataInfo) -> tuple[str, ...]:
    """Return the names of a network's outputs; none without a head."""
    return info.class_names if task.outputs(info) else ()


def seen_by(student: TappedModel) -> InputOptions | None:
    """Return what the student sees of a sample; None: all of it."""
    return student.adapt.seen.options if isinstance(student.adapt, SeenInput) else None


def relative_gap(exported: Tensor, expected: Tensor) -> float:
    # the clamp avoids 0 / 0 if all values are 0
    return float((exported - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
