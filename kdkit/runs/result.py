"""The result of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        folder: the run folder.
        name, seed: the recipe's.
        test: metrics of the student (`kdkit.engine.evaluate.metrics`): after the last epoch, or of
            the mean of its best epochs' weights.
        validation: the same metrics on the validation split, if there is one.
        best: of the epoch with the best validation accuracy: `epoch`, `validation` and `test`
            metrics.
        averaged: the epochs over which `train.average_best` took the mean; none without it.
        last: metrics of the student after the last epoch, if it is such a mean: `validation` and
            `test` metrics.
        files: SHA-256 of each file of weights that the run leaves, and of its metrics.jsonl, by its
            path in the folder (none: written by an older kdkit).
        teacher: the teacher's own metrics on the test data.
        peers: metrics of the other students on the test data.
        ensemble: of all students (and models in their company) together, on the test data.
        network: options of the student's network, if it is not the recipe's `student` (a peer that
            a schedule names).
        parameters: of the student.
        seconds: training time, measurements included.
        cpu_seconds: CPU time of this process, without its loader workers.
    """

    folder: Path
    name: str
    seed: int
    test: Mapping[str, float]
    parameters: int
    seconds: float
    cpu_seconds: float
    epochs: int
    validation: Mapping[str, float] | None = None
    best: Mapping[str, Any] | None = None
    teacher: Mapping[str, float] | None = None
    peers: tuple[Mapping[str, float], ...] = ()
    ensemble: Mapping[str, float] | None = None
    network: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())
    averaged: tuple[int, ...] = ()
    last: Mapping[str, Mapping[str, float]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """The moment at which the measured weights were taken, in words."""
        return (
            f"mean of epochs {', '.join(map(str, self.averaged))}"
            if self.averaged
            else "last epoch"
        )

    @property
    def student(self) -> Path:
        """Path of the student's weights, safetensors."""
        return self.folder / "student.safetensors"
