"""The classes of a teacher's network, and which of them are those of the data."""

from __future__ import annotations

from collections.abc import Mapping

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import (
    OWN_OUTPUTS,
    RecipeTeacher,
)
from kdkit.errors import suggest
from kdkit.recipe import Recipe
from kdkit.runs.trained_teachers import TrainedTeacher


class TeacherClasses:
    """The classes of a recipe's teachers, by the teachers' names."""

    def __init__(
        self, recipe: Recipe, info: DataInfo, trained: Mapping[str, TrainedTeacher]
    ) -> None:
        self._recipe = recipe
        self._info = info
        self._trained = trained

    def own(self, name: str) -> int:
        """Return the number of classes of a teacher's network; 0: it has none."""
        spec = self._recipe.spec.all_teachers()[name]
        said = getattr(spec, OWN_OUTPUTS, None)
        if said is None and isinstance(spec, RecipeTeacher) and name in self._trained:
            said = self._trained[name].outputs
        return self._info.outputs if said is None else said

    def chosen(self, name: str) -> list[int] | None:
        """Return which of a teacher's classes are those of the data, in the data's order; None:
        all, in the same order.

        Raises:
            RecipeError: they do not give one of its classes for each class of the data.
        """
        spec = self._recipe.spec.all_teachers()[name]
        chosen = getattr(spec, "classes", None)
        if chosen is None:
            return None
        place = [*self._recipe.spec.place_of(name), "classes"]
        own = self.own(name)
        names = self._info.class_names
        if isinstance(chosen, dict):
            if not names:
                raise self._recipe.error(
                    place, "the data's classes have no names; give a list of numbers"
                )
            if other := set(chosen) ^ set(names):
                raise self._recipe.error(
                    place,
                    f"a number for each class of the data, please: {suggest(other.pop(), names)}",
                )
            chosen = [chosen[one] for one in names]
        if len(chosen) != self._info.outputs or len(set(chosen)) < len(chosen):
            says = (
                f"{len(set(chosen))} different classes are named, and the data has"
                f" {self._info.outputs}"
            )
            raise self._recipe.error(place, says)
        if max(chosen) >= own:
            raise self._recipe.error(
                place,
                f"class {max(chosen)} of a network of {own}, counted from 0; see `{OWN_OUTPUTS}`",
            )
        return list(chosen)

    def are_known(self, name: str) -> bool:
        """Check whether a teacher's answers are about the data's classes."""
        return self.chosen(name) is not None or self.own(name) == self._info.outputs
