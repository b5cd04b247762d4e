"""Training lengths of a study's variants, and the check that none unintentionally trains longer
than the baseline.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdkit.data.subsets import images_per_epoch, samples
from kdkit.errors import KdkitError, RecipeError
from kdkit.recipe import Recipe
from kdkit.recipe.fairness import advice
from kdkit.recipe.sections import DataSpec
from kdkit.runs.folder import RunFolder
from kdkit.runs.plan import Plan
from kdkit.students.loaded import LoadedRun
from kdkit.study.findings import Length

STEPS = "steps"  # pseudo-key in `allow`: variants may train longer than the baseline
EPOCHS = "train.epochs"  # allowing this key also allows longer training


def of_plan(plan: Plan, data: DataSpec) -> Length:
    """Compute the length from the plan of `kdkit check`; `data` is the recipe's section."""
    epochs, steps = (
        sum(counts) for counts in zip(*((s.epochs, s.steps) for s in plan.stages), strict=True)
    )
    return Length(plan.num_train, epochs, steps, epochs * images_per_epoch(data, plan.num_train))


def of_run(folder: RunFolder, data: DataSpec) -> Length:
    """Compute the length from a finished run's files; `data` is its recipe's section."""
    # of each stage, its last epoch
    ends = {line["stage"]: line for line in folder.metrics("epoch")}.values()
    count, epochs = samples(data, folder.info().num_train), sum(end["epoch"] for end in ends)
    return Length(
        count, epochs, sum(end["step"] for end in ends), epochs * images_per_epoch(data, count)
    )


def mean_length(runs: Sequence[tuple[RunFolder, DataSpec]]) -> Length | None:
    """Average the lengths of a variant's finished runs, which may end after different epochs; None
    without any.
    """
    found = [of_run(folder, data) for folder, data in runs]
    whole = zip(*((one.samples, one.epochs, one.steps, one.images) for one in found), strict=True)
    return Length(*(round(statistics.fmean(values)) for values in whole)) if found else None


def of_teachers(folder: Path, plugins: Sequence[Path]) -> tuple[Length, ...]:
    """Return the lengths of those teachers of a run that other recipes train; empty if their runs
    no longer exist, or need more than `plugins`.
    """
    try:
        runs = LoadedRun(folder, plugins=plugins).teacher_runs()
        return tuple(of_run(one, one.recipe(plugins=plugins).spec.data) for one in runs)
    # the lengths are only reported: what cannot be read is left out
    except KdkitError:
        return ()


def refuse_longer(
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
