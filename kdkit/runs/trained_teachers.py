"""Students of other recipes as teachers, and the options that a run's network was built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kdkit.cache import served
from kdkit.contracts.model_source import ModelOptions, RecipeTeacher
from kdkit.errors import RunError
from kdkit.recipe import Recipe, code_in
from kdkit.recipe.types import student_type
from kdkit.runs.folder import RunFolder
from kdkit.runs.progress import Reporter
from kdkit.runs.result import Result


@dataclass(frozen=True)
class TrainedTeacher:
    """The student of another recipe as a teacher: its options, the file of its weights, and those
    of its snapshots by epoch (None: not trained yet).

    `scores` are those on its own test data. `run` is the one that trained it.
    `outputs` counts the outputs of its network; 0: it has no head.
    """

    options: ModelOptions
    file: Path | None
    snapshots: Mapping[int, Path | None] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    run: RunFolder | None = None
    outputs: int | None = None

    @classmethod
    def of(cls, run: RunFolder, recipe: Recipe, result: Result | None) -> Self:
        """Describe the student that a run has trained."""
        return cls(
            options_of(recipe, result.network if result else None),
            run.student_file,
            run.snapshots(),
            result.test if result else {},
            run,
            recipe.task.outputs(run.info()),
        )

    @classmethod
    def elsewhere(cls, recipe: Recipe, name: str, source: Recipe) -> Self:
        """Describe a served teacher, which `source` has trained, by what its server says."""
        server = served.ServedTeacher(recipe, name, name, Reporter().warn)
        try:
            about = server.about()
        finally:
            server.close()
        options = options_of(source, about["network"])
        return cls(options, None, scores=about["scores"], outputs=about["outputs"])

    def checked(self, file: Path | None) -> Path | None:
        """Return one of its files, compared with the digest that the run recorded.

        Raises:
            RunError: it is damaged.
        """
        if file is not None and self.run is not None:
            self.run.refuse_damaged(file)
        return file


def snapshot_of(
    recipe: Recipe, trained: Mapping[str, TrainedTeacher], name: str, epoch: int
) -> Path | None:
    """Return the file of a teacher's weights after an epoch of its training.

    Raises:
        RunError: there is none.
    """
    spec = recipe.spec.all_teachers()[name]
    if served.addresses(recipe, name):
        raise RunError(
            f"{name} is served (`at`) as it is at the end of its training, and this schedule asks"
            " for an earlier epoch; leave `at` out"
        )
    if not isinstance(spec, RecipeTeacher):
        raise RunError(
            f"{name} has no snapshots of its training, which only a teacher of another recipe"
            " has; name it by `recipe:`"
        )
    there, whose = trained[name].snapshots, f"the run of {name} ({spec.recipe.name})"
    if not there:
        raise RunError(
            f"{whose} keeps no snapshots; set `run.snapshots: N` in {spec.recipe.name}, and"
            " train it again if it is trained"
        )
    if epoch not in there:
        raise RunError(
            f"{whose} has no snapshot of epoch {epoch}, only of {', '.join(map(str, there))};"
            " see its `run.snapshots`"
        )
    return there[epoch]


def options_of(recipe: Recipe, network: Mapping[str, Any] | None) -> ModelOptions:
    """Restore the options of a network from the record of `ModelFactory.network`; None: the
    recipe's `student`.
    """
    if network is None:
        return recipe.spec.student
    options = student_type(network["model"], recipe.plugins)(**network)
    if strange := {path for _, path in code_in(options)} - set(recipe.code()):
        raise RunError(
            f"the run of {recipe.source.path} says that its network is made by {min(strange)},"
            " which its recipe does not name"
        )
    return options
