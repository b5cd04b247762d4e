"""What a study trains: each variant with each seed, in its folder, measured by which scores; and
whether it can, checked before anything is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdkit.contracts.task import ScoreInfo
from kdkit.data.subsets import images_per_epoch
from kdkit.engine.evaluate import Judge
from kdkit.errors import RecipeError, RunError, shown, suggest
from kdkit.recipe import Recipe
from kdkit.recipe.data_section import DataSpec
from kdkit.recipe.fairness import advice, refuse_mixed, refuse_unequal
from kdkit.runs import checks
from kdkit.runs.folder import RunFolder
from kdkit.runs.plan import Plan
from kdkit.runs.run import Run
from kdkit.runs.training import folder_for
from kdkit.study.findings import LOSSES, Length
from kdkit.study.measurements import of_run
from kdkit.study.variants import STEPS, Study, has, point_name

EPOCHS = "train.epochs"  # allowing this key also allows longer training


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
    # before the keys in which they differ, which may be allowed
    refuse_mixed("task", {name: recipe.task.name for name, recipe in study.variants.items()})
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
    scores = {i.name: i for judge in judges for score in judge.scores for i in score.infos()}
    agreement = {i.name: i for judge in judges for score in judge.agreement for i in score.infos()}
    return tuple(scores.values()), tuple(agreement.values())


def check(study: Study, fetch: Callable[[str], None] | None = None) -> dict[str, Length]:
    """Check everything that can be refused before anything is trained.

    Args:
        study: the study to check.
        fetch: called with a message before each download (None: nothing is fetched).

    Returns:
        The length of each variant's training; in a search, of its longest point.

    Raises:
        RecipeError: a variant cannot work, differs in more than what is compared, or trains longer
            than the baseline.
        RunError: the study's folder is a run's.
    """
    planned = trainings(study)
    if study.points:
        # One point stands for all of a variant: the longest, as lengths are compared.
        planned = _at_longest_points(study)
    lengths: dict[str, Length] = {}
    judged_by: dict[str, Judge] = {}
    problems: list[str] = []
    # One run a variant: seeds change no shape.
    by_variant = {each.variant: each for each in planned}
    # finished runs need no plan
    by_variant |= {each.variant: each for each in planned if each.result}
    for name, each in by_variant.items():
        try:
            # patience may have ended this run early, so its length is not comparable
            if each.result is not None and not each.recipe.spec.train.patience:
                lengths[name] = of_run(RunFolder(each.folder), each.recipe.spec.data)
                (judged_by[name],) = judges([each])
            else:
                made = checks.make(each.recipe, fetch)
                lengths[name] = _of_plan(made, each.recipe.spec.data)
                judged_by[name] = Judge.of(each.recipe, made.info)
        except RecipeError as error:
            problems += [f"{line} (variant {name})" for line in str(error).splitlines()]
    if problems:
        # Variants share a base: a problem of the base is one line.
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    refuse_mixed("deciding score", {name: one.deciding.title for name, one in judged_by.items()})
    _refuse_unknown_scores(study, [*judged_by.values()])
    _refuse_longer(lengths, study.variants, study.baseline, study.allow)
    # In the study's order: finished runs came last above.
    return {name: lengths[name] for name in study.variants}


def _at_longest_points(study: Study) -> list[StudyRun]:
    """List those trainings of a search that are the longest of their variants, under the variants'
    names.
    """
    variants: dict[str, str] = {}
    for name, points in study.points.items():
        longest = max(points, key=lambda point: point.recipe.spec.train.epochs)
        variants[point_name(name, longest)] = name
    return [
        replace(each, variant=variants[each.variant])
        for each in trainings(study.search)
        if each.variant in variants
    ]


def _refuse_unknown_scores(study: Study, judged_by: Sequence[Judge]) -> None:
    """Check that every score in `show` is a score of some variant.

    Raises:
        RecipeError: some are not, one a line.
    """
    scores, agreement = scores_of(judged_by)
    known = [*LOSSES, *(score.name for score in (*scores, *agreement))]
    lines = [
        f"{place}: got {shown(name)}; {suggest(name, known)}"
        for name, place in study.show.items()
        if name not in known
    ]
    if lines:
        raise RecipeError("\n".join(lines))


def _of_plan(plan: Plan, data: DataSpec) -> Length:
    """Compute the length from the plan of `kdkit check`; `data` is the recipe's section."""
    epochs, steps = (
        sum(counts) for counts in zip(*((s.epochs, s.steps) for s in plan.stages), strict=True)
    )
    return Length(plan.num_train, epochs, steps, epochs * images_per_epoch(data, plan.num_train))


def _refuse_longer(
    lengths: Mapping[str, Length],
    recipes: Mapping[str, Recipe],
    baseline: str,
    allowed: Sequence[str],
) -> None:
    """Check that no variant trains longer than the baseline: more steps help by themselves.

    Raises:
        RecipeError: some do; one line a variant, with the place of its schedule and the way to
            allow it.
    """
    # Who allows `train` allows `train.epochs` too.
    if STEPS in allowed or any(key == EPOCHS or EPOCHS.startswith(f"{key}.") for key in allowed):
        return
    known = lengths[baseline]
    lines = [
        f"{recipes[name].source.where(['schedule'])}: {name}: {STEPS}: {one.steps:,} in all its"
        f" stages, with {one.images:,} images ({baseline}: {known.steps:,}, with {known.images:,})"
        for name, one in lengths.items()
        if one.longer_than(known)
    ]
    if lines:
        raise RecipeError(
            "\n".join(
                [*lines, f"a variant may not train longer than the baseline; {advice([STEPS])}"]
            )
        )
