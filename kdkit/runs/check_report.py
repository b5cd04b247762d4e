"""Collects the problems of a recipe and the notes on it, each with its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from kdkit.errors import (
    DataError,
    KdkitError,
    ModelError,
    RecipeError,
    RunError,
    ShapeError,
    TapError,
    cause,
)
from kdkit.recipe import Recipe, fetching


class Report:
    """Problems and notes of a check.

    Args:
        recipe: the recipe whose lines they name.
        fetches: whether missing files are fetched.
    """

    def __init__(self, recipe: Recipe, *, fetches: bool) -> None:
        self.recipe = recipe
        self.fetches = fetches
        self.problems: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def at(self, *location: str | int) -> Iterator[None]:
        """Collect errors raised inside as problems of that place in the recipe."""
        try:
            yield
        except RecipeError as error:  # a RecipeError already contains its place
            self.problems.append(f"{error}{self._hint(error)}")
        except (DataError, ModelError, TapError, ShapeError, RunError) as error:
            self.refuse(self._place(error, location), f"{error}{self._hint(error)}")
        except Exception as error:
            # Elsewhere an unexpected error is a fault of kdkit, and keeps its traceback.
            if location != ("schedule",):
                raise
            # an error in a plugin's own code
            says = f"fails: {cause(error)}"
            self.refuse(location, f"schedule '{self.recipe.spec.schedule.use}' {says}")

    def refuse(self, location: Sequence[str | int], says: str) -> None:
        """Add a problem of that place in the recipe."""
        self.problems.append(self.recipe.problem(location, says))

    def raise_if_any(self) -> None:
        """End the check if there are problems.

        Raises:
            RecipeError: all problems, one a line.
        """
        if self.problems:
            # One problem may be found in several stages: each line once.
            raise RecipeError("\n".join(dict.fromkeys(self.problems)))

    def _hint(self, error: KdkitError) -> str:
        """Return advice for errors of something that would have to be fetched."""
        return (
            "; a check fetches nothing, `kdkit train` does"
            if not self.fetches and fetching.wanted_to_fetch(error)
            else ""
        )

    def _place(self, error: KdkitError, location: Sequence[str | int]) -> Sequence[str | int]:
        """Find the place in the recipe of the layer that a TapError names."""
        if isinstance(error, TapError):
            for i, entry in enumerate(self.recipe.spec.losses):
                if any(
                    f"'{name}'" in str(error)
                    for pair in entry.taps()
                    for name in (pair.student, pair.teacher)
                ):
                    return ["losses", i, "layers"]
        return location


class Checks:
    """Checks of one part of a recipe, which add to a report."""

    def __init__(self, recipe: Recipe, report: Report) -> None:
        self.recipe = recipe
        self.spec = recipe.spec
        self.task = recipe.task
        self.report = report
