"""State that the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from kdkit.data.loaders import Data
from kdkit.engine.evaluate import Judge, TaughtAnswers
from kdkit.engine.turns import Stopwatch
from kdkit.recipe import Recipe
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import StopRequest
from kdkit.runs.networks import ModelFactory
from kdkit.runs.progress import Reporter
from kdkit.runs.shared import Shared


@dataclass
class RunContext:
    """One process's view of a run."""

    recipe: Recipe
    folder: RunFolder
    reporter: Reporter
    stop: StopRequest
    accelerator: Accelerator
    data: Data
    factory: ModelFactory
    clock: Stopwatch  # over all attempts
    shared: Shared  # with runs trained side by side
    judge: Judge
    teacher: TaughtAnswers | None = None  # on the test data
    best: dict[str, Any] | None = None  # of the epoch with the best score on validation
    until: int | None = None  # epochs of all stages together after which the run pauses

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)
