"""Compares the meaning of a network's inputs and outputs with that of the data: the numbers of
classes and tokens, and which of a teacher's classes are the data's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import (
    OWN_OUTPUTS,
    Meaning,
    ModelOptions,
    ModelSource,
    RecipeTeacher,
)
from kdkit.errors import ModelError, suggest
from kdkit.recipe import Recipe
from kdkit.runs.trained_teachers import TrainedTeacher


def meaning_of(options: ModelOptions, source: ModelSource, module: Any) -> Meaning:
    """Return the known meaning of a network: from the files of the run or export beside its
    checkpoint, or from its source.
    """
    # Files beside a checkpoint are of these weights; a model source knows only those that it
    # publishes.
    beside = _beside(options.checkpoint) if options.checkpoint else None
    return beside or source.meaning(module)


def refuse_other_meaning(theirs: Meaning, info: DataInfo, whose: str) -> None:
    """Compare what is known of a network's classes and tokens with those of the data.

    Args:
        theirs: of a network.
        info: of the data.
        whose: the network, for the message.

    Raises:
        ModelError: a class or a token has another number than in the data.
    """
    # not strict: either side may have no names
    for number, (name, ours) in enumerate(zip(theirs.class_names, info.class_names, strict=False)):
        # The same names in another order are a mistake; other names may be translations or
        # spellings.
        if name != ours and (name in info.class_names or ours in theirs.class_names):
            raise ModelError(
                f"{whose} has the classes in another order: class {number} is '{name}' there and"
                f" '{ours}' in the data"
            )
    if theirs.tokenizer and info.tokenizer and theirs.tokenizer != info.tokenizer:
        raise ModelError(
            f"{whose} has another tokenizer than the data: the same words are other token ids there"
        )
    # More embeddings than tokens are usual: sizes are rounded up.
    if theirs.num_tokens and info.num_tokens > theirs.num_tokens:
        raise ModelError(
            f"{whose} knows {theirs.num_tokens:,} tokens, and the data's tokenizer has"
            f" {info.num_tokens:,}"
        )


def other_class_names(theirs: Meaning, info: DataInfo) -> str:
    """Return a name that only one side has, if both name their classes; otherwise an empty
    string.
    """
    strangers = [name for name in theirs.class_names if name not in info.class_names]
    return strangers[0] if strangers and info.class_names else ""


def _beside(checkpoint: Path) -> Meaning | None:
    """Read the meaning of the weights in a run folder or an exported folder."""
    for file, key in (("run.json", "data"), ("config.json", "kdkit")):
        # without a readable file nothing is known, which is no error
        with contextlib.suppress(OSError, ValueError):
            # Plain JSON, not `RunFolder`: the file may be of another program, or in an exported
            # folder.
            about = json.loads((checkpoint.parent / file).read_text(encoding="utf-8"))
            told = about.get(key) if isinstance(about, Mapping) else None
            if isinstance(told, Mapping):
                return Meaning(
                    tuple(told.get("class_names") or ()), str(told.get("tokenizer") or ""), 0
                )
    return None


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
        # A task of embeddings builds the networks of other recipes without their heads too.
        if said is None and self._wanted and isinstance(spec, RecipeTeacher):
            said = self._trained[name].outputs if name in self._trained else None
        return self._wanted if said is None else said

    @property
    def _wanted(self) -> int:
        return self._recipe.task.outputs(self._info)

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
            # Either side may have a name that the other lacks.
            if other := set(chosen) ^ set(names):
                raise self._recipe.error(
                    place,
                    f"a number for each class of the data, please: {suggest(other.pop(), names)}",
                )
            chosen = [chosen[one] for one in names]
        # A class that is named twice would get its probability twice.
        if len(chosen) != self._info.outputs or len(set(chosen)) < len(chosen):
            says = (
                f"{len(set(chosen))} different classes are named, and the data has"
                f" {self._info.outputs}"
            )
            raise self._recipe.error(place, says)
        # Negative numbers are refused by the recipe's own types.
        if max(chosen) >= own:
            raise self._recipe.error(
                place,
                f"class {max(chosen)} of a network of {own}, counted from 0; see `{OWN_OUTPUTS}`",
            )
        return list(chosen)

    def are_known(self, name: str) -> bool:
        """Check whether a teacher's answers are about the data's classes."""
        # Without `classes`, as many classes as the data are taken for the same ones; names are
        # compared elsewhere.
        return self.chosen(name) is not None or self.own(name) == self._wanted
