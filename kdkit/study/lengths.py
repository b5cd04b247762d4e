"""How long the variants of a study train, and that none trains longer than the baseline unasked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdkit.data.subsets import images_per_epoch, samples
from kdkit.errors import KdkitError, RecipeError
from kdkit.recipe import Recipe
from kdkit.recipe.fairness import advice
from kdkit.recipe.sections import DataSpec
from kdkit.runs import checks
from kdkit.runs.folder import RunFolder
from kdkit.students.loaded import TrainedRun
from kdkit.study.findings import Length

STEPS = "steps"  # among the keys that `allow` names, lets variants train longer than the baseline
EPOCHS = "train.epochs"  # whoever lets variants differ in these lets them train longer


def of_plan(recipe: Recipe, fetch: Callable[[str], None] | None) -> Length:
    """As `kdkit check` finds it out; `fetch` is told of what is fetched for it.

    Raises:
        RecipeError: the recipe cannot work.
    """
    made = checks.make(recipe, fetch)
    epochs, steps = (
        sum(counts) for counts in zip(*((s.epochs, s.steps) for s in made.stages), strict=True)
    )
    return Length(
        made.num_train, epochs, steps, epochs * images_per_epoch(recipe.spec.data, made.num_train)
    )


def of_run(folder: RunFolder, data: DataSpec) -> Length:
    """As a finished run has written it down; `data` is its recipe's section."""
    # of each stage, its last epoch
    ends = {line["stage"]: line for line in folder.metrics("epoch")}.values()
    count, epochs = samples(data, folder.info().num_train), sum(end["epoch"] for end in ends)
    return Length(
        count, epochs, sum(end["step"] for end in ends), epochs * images_per_epoch(data, count)
    )


def mean_length(runs: Sequence[tuple[RunFolder, DataSpec]]) -> Length | None:
    """Of finished runs of one variant, on average, as they need not end after the same epoch;
    None without any.
    """
    found = [of_run(folder, data) for folder, data in runs]
    whole = zip(*((one.samples, one.epochs, one.steps, one.images) for one in found), strict=True)
    return Length(*(round(statistics.fmean(values)) for values in whole)) if found else None


def of_teachers(folder: Path, plugins: Sequence[Path]) -> tuple[Length, ...]:
    """Of those teachers of a run that other recipes train; none where their runs are not there
    any more, or need more than `plugins`.
    """
    try:
        runs = TrainedRun(folder, plugins=plugins).teacher_runs()
        return tuple(of_run(one, one.recipe(plugins=plugins).spec.data) for one in runs)
    except KdkitError:
        return ()


def refuse_longer(
    lengths: Mapping[str, Length],
    recipes: Mapping[str, Recipe],
    baseline: str,
    allowed: Sequence[str],
) -> None:
    """Make sure that the baseline trains as long as every variant: more steps help by
    themselves.

    Raises:
        RecipeError: it does not; a line for each variant, with the place of its schedule, and how
            to allow it.
    """
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
