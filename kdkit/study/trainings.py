"""The trainings of a study: each variant with each seed, in its folder, and the scores that measure
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdkit.contracts.task import ScoreInfo
from kdkit.engine.evaluate import Judge
from kdkit.errors import RecipeError, RunError
from kdkit.recipe.fairness import refuse_unequal
from kdkit.runs.folder import RunFolder
from kdkit.runs.run import Run
from kdkit.runs.training import folder_for
from kdkit.study.variants import STEPS, Study, has


@dataclass(frozen=True)
class StudyRun(Run):
    """One run of a study: a variant with a seed."""

    variant: str
    seed: int


def trainings(study: Study) -> list[StudyRun]:
    """List every variant with every seed.

    A run of the same content is reused from its folder: a finished one anywhere in the study's runs
    folder, an unfinished one in the study's own. Equal variants are one training.

    Raises:
        RecipeError: the variants differ in more than what is compared.
        RunError: the study's folder is a run's.
    """
    _refuse_unknown(study)
    refuse_unequal(study.variants, study.baseline, (*study.allow, *study.tune))
    if (study.path / "run.json").is_file():
        raise RunError(f"{study.path} is the folder of a run; give the study another `name:`")
    folders = _known_runs(study)
    planned = []
    for variant in study.variants:
        for seed in study.seeds:
            recipe = study.recipe(variant, seed)
            fingerprint = recipe.fingerprint
            if fingerprint not in folders and recipe.older_fingerprint in folders:
                fingerprint = recipe.older_fingerprint
            if fingerprint not in folders:
                name = f"{recipe.spec.name}-seed{seed}"
                folders[fingerprint] = folder_for(recipe, study.path, name)
            planned.append(StudyRun(recipe, folders[fingerprint], variant, seed))
    return planned


def _refuse_unknown(study: Study) -> None:
    """Check that every key that may differ exists in some variant.

    Raises:
        RecipeError: one does not; it may be misspelt.
    """
    for key in study.allow:
        if key != STEPS and not any(
            has(recipe.spec, key.split(".")) for recipe in study.variants.values()
        ):
            raise RecipeError(f"allow: no variant has the key '{key}'")


def _known_runs(study: Study) -> dict[str, Path]:
    """Find the folders of runs by fingerprint; a finished one is preferred, then one in the
    study's own folder.
    """
    markers = [
        *study.path.glob("*/run.json"),
        *study.folder.glob("*/run.json"),
        *study.folder.glob("*/*/run.json"),
    ]
    finished: dict[str, Path] = {}
    unfinished: dict[str, Path] = {}
    for marker in dict.fromkeys(
        sorted(markers, key=lambda path: (path.parent.parent != study.path, path))
    ):
        folder = RunFolder(marker.parent)
        # a damaged run, or another program's: it cannot be reused
        with contextlib.suppress(RunError):
            fingerprint = folder.about()["fingerprint"]
            if folder.path.parent == study.path:
                unfinished.setdefault(fingerprint, folder.path)
            if folder.result():
                finished.setdefault(fingerprint, folder.path)
    return unfinished | finished


def judges(planned: Iterable[StudyRun]) -> list[Judge]:
    """Find the judge of each variant that has a started run."""
    begun = {each.variant: each for each in planned if RunFolder(each.folder).marker.is_file()}
    return [Judge.of(each.recipe, RunFolder(each.folder).info()) for each in begun.values()]


def scores_of(judges: Sequence[Judge]) -> tuple[tuple[ScoreInfo, ...], tuple[ScoreInfo, ...]]:
    """List the scores and the agreement of all variants, each once, in the judges' order."""
    scores = {score.name: score.info() for judge in judges for score in judge.scores}
    agreement = {score.name: score.info() for judge in judges for score in judge.agreement}
    return tuple(scores.values()), tuple(agreement.values())
