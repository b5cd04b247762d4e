"""How long the training of a study still takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kdkit.errors import KdkitError
from kdkit.runs.folder import RunFolder
from kdkit.runs.progress import clock


class TimeLeft:
    """Estimates how long the training of some runs still takes, from what their epochs have taken.

    Args:
        epochs: of each run, all its stages together, by its folder.
    """

    def __init__(self, epochs: Mapping[Path, int]) -> None:
        self._epochs = epochs
        self._began, self._before = time.monotonic(), self._done()

    def _done(self) -> int:
        """Count the epochs that are over; a run that has ended early has none left."""
        return sum(
            epochs if RunFolder(path).result_file.is_file() else min(epochs, _logged(path))
            for path, epochs in self._epochs.items()
        )

    def told(self, more: int = 0) -> str:
        """Return the end of a sentence, empty if nothing is known yet; `more` epochs are over, but
        not logged.
        """
        # Processes that share a study log in the same folders: their epochs count.
        done = self._done() + more
        if done <= self._before:
            return ""
        rest = (sum(self._epochs.values()) - done) / (done - self._before)
        return f", about {clock(rest * (time.monotonic() - self._began))} left in all"


def _logged(path: Path) -> int:
    # A damaged file is told where it is needed: an estimate does without it.
    with suppress(KdkitError):
        return len(RunFolder(path).metrics("epoch"))
    return 0
