"""A recipe, and the folder in which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdkit.recipe import Recipe
from kdkit.runs.folder import RunFolder
from kdkit.runs.result import Result


@dataclass(frozen=True)
class Run:
    """A recipe, and the folder in which it runs, or will run."""

    recipe: Recipe
    folder: Path

    @property
    def key(self) -> str:
        """Key that identifies what is trained."""
        # Not the folder: a run that was moved, or is another study's, is the same training.
        return self.recipe.fingerprint

    @property
    def result(self) -> Result | None:
        """Return the result if the run is finished."""
        return RunFolder(self.folder).finished(self.recipe)
