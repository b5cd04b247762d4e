"""What the stages of a run share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from kdkit.data import Data
from kdkit.evaluate import Predictions
from kdkit.factory import ModelFactory
from kdkit.progress import Reporter
from kdkit.recipe import Recipe
from kdkit.run_folder import RunFolder
from kdkit.signals import StopRequest


@dataclass
class Setting:
    """One process's view of a run."""

    recipe: Recipe
    folder: RunFolder
    reporter: Reporter
    stop: StopRequest
    accelerator: Accelerator
    data: Data
    factory: ModelFactory
    teacher: Predictions | None = None  # on the test data
    seconds: float = 0.0  # trained so far, before `began`
    began: float = field(default_factory=time.monotonic)
    best: dict[str, Any] | None = None  # of the epoch with the best validation accuracy

    def spent(self) -> float:
        """Seconds of training, over all attempts."""
        return self.seconds + time.monotonic() - self.began

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)
