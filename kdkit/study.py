"""Trains recipes with several seeds each and sets their results side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from kdkit import plan, profile, recipe, runs
from kdkit.evaluate import Predictions, metrics, predict, predict_together
from kdkit.recipe import Recipe
from kdkit.run_folder import Result
from kdkit.tapping import TappedModel
from kdkit.trained import TrainedRun


@dataclass(frozen=True)
class Row:
    """One recipe, or the teacher.

    Attributes:
        name: the recipe's.
        top1: test accuracies in percent after the last epoch, one a seed.
        agreement: with the teacher on the test data, in percent, one a seed; empty where there is no common teacher.
        cost: of its network.
    """

    name: str
    top1: tuple[float, ...]
    agreement: tuple[float, ...]
    cost: profile.Profile


def compare(
    paths: Sequence[Path],
    seeds: int,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Train every recipe with the seeds 0 to `seeds` - 1 (what is trained already is not trained again), then measure all alike.

    Runs are kept in `run.folder`/NAME-seedN (and the fingerprint, if another recipe's run is there).
    The teacher is the one that the recipes name; runs that have none are compared with it too.

    Args:
        paths: the recipe files.
        seeds: how many.
        overrides: values by key path, for all of them.
        plugins: further plugin files or folders.
        say: told of every run that is finished.

    Raises:
        RecipeError: a recipe is wrong; found before anything is trained.
    """
    planned = [[recipe.load(path, {**(overrides or {}), "seed": seed}, plugins) for seed in range(seeds)] for path in paths]
    for first, *_ in planned:
        plan.make(first)
    results = [[_train(each, say) for each in variants] for variants in planned]
    finished = [[TrainedRun(result.folder) for result in variant] for variant in results]
    teachers = _common_teachers([run for variant in finished for run in variant])
    known = predict_together(teachers, finished[0][0].data().test)
    models = [(teacher, finished[0][0].info.image_shape) for teacher in teachers[:1]] + [
        (variant[0].student(), variant[0].info.image_shape) for variant in finished
    ]
    with profile.threads(1):  # several threads wait for each other on a busy machine
        costs = profile.measure_together(models, runs=300, seconds=1.0)
    rows = [Row("teacher", (metrics(known)["top1"],), (), costs.pop(0))] if known else []
    for variants, trained, cost in zip(results, finished, costs, strict=True):
        agreement = tuple(_agreement(run, known) for run in trained) if known else ()
        rows.append(Row(variants[0].name, tuple(result.test["top1"] for result in variants), agreement, cost))
    return rows


def spread(values: Sequence[float]) -> str:
    """`93.4 +- 0.8`: mean and standard deviation over the seeds; one value has no deviation."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a terminal."""
    drawn = Table("", "top-1 %", "agreement %", "parameters", "size", "latency", box=None, pad_edge=False)
    for row in rows:
        size, latency = f"{row.cost.bytes / 1024:,.0f} KiB", f"{1000 * row.cost.latencies[0].percentile(50):.2f} ms"
        drawn.add_row(row.name, spread(row.top1), spread(row.agreement), f"{row.cost.parameters:,}", size, latency)
    return drawn


def caption(seeds: int) -> str:
    """What the numbers of the table are."""
    deviation = f"{seeds} seeds, mean +- standard deviation" if seeds > 1 else "one seed, so no deviation"
    return f"Test data, after the last epoch; {deviation}; agreement with the teacher; median latency of one image on one thread."


def _train(each: Recipe, say: Callable[[str], None]) -> Result:
    name = f"{each.spec.name}-seed{each.spec.seed}"
    say(f"{name}: training")
    result = runs.train(each, runs.folder_for(each, each.spec.run.folder, name), quiet=True)
    say(f"{name}: top-1 {result.test['top1']:.2f} %, trained in {result.seconds:.1f} s, see {result.folder}")
    return result


def _common_teachers(finished: Sequence[TrainedRun]) -> list[TappedModel]:
    """The teachers of all runs that have any, if they are the same."""
    taught = [run for run in finished if run.recipe.spec.all_teachers()]
    return taught[0].teachers() if len({_who(run.recipe) for run in taught}) == 1 else []


def _who(recipe: Recipe) -> str:
    """What the teachers are, without how they are run."""
    content = recipe.content()
    return str([one.get("recipe", one) for one in (content["teacher"], *content["teachers"]) if one])


def _agreement(run: TrainedRun, teacher: Predictions) -> float:
    return metrics(predict(run.student(), run.data().test), teacher)["agreement"]
