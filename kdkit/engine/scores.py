"""The scores of a recipe: those of its task, and the metrics that it names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from kdkit.contracts.dataset_source import DataInfo, DatasetSource
from kdkit.contracts.options import said
from kdkit.contracts.task import Score, ScoreInfo, serves
from kdkit.errors import DataError, one_line, suggest
from kdkit.recipe import Recipe, registry
from kdkit.recipe.sections import MetricEntry

NAMED_FOR = {"Multiclass": "classes", "Multilabel": "labels"}
"""What the rows are for a class of torchmetrics, by how its name begins."""


def scores_of(recipe: Recipe, info: DataInfo) -> tuple[Score, ...]:
    """Return the scores of a recipe; the first one is used to choose epochs, students and variants.

    Raises:
        RecipeError: a metric does not exist, or does not accept its arguments.
    """
    scores = [*recipe.task.scores(info), *_metrics(recipe, info)]
    if (entry := recipe.spec.decide_by) is None:
        return tuple(scores)
    own = next((s for s in scores if s.name == entry.use and not entry.arguments), None)
    first = own or _made(recipe, entry, info, ["decide_by"])
    if first.parts:
        raise recipe.error(["decide_by"], f"'{first.name}' is {len(first.parts)} numbers, not one")
    return (first, *(score for score in scores if score.name != first.name))


@functools.lru_cache(maxsize=1000)
def usual_scores(info: DataInfo) -> dict[str, ScoreInfo]:
    """Describe the scores of the task that all runs had before there were others."""
    if (task := registry.load().tasks.get(DatasetSource.task)) is None:
        return {}
    scores = (*task().scores(info), *task().agreement(info))
    return {info.name: info for score in scores for info in score.infos()}


def deciding(recipe: Recipe, info: DataInfo) -> Score:
    """Return the score that is used to choose epochs, students and variants."""
    return scores_of(recipe, info)[0]


def _metrics(recipe: Recipe, info: DataInfo) -> Iterator[Score]:
    taken = {score.name for score in (*recipe.task.scores(info), *recipe.task.agreement(info))}
    for i, entry in enumerate(recipe.spec.metrics):
        if entry.use in taken:
            raise recipe.error(["metrics", i], f"there is a score '{entry.use}' already")
        score = _made(recipe, entry, info, ["metrics", i])
        if score.name in taken:
            raise recipe.error(["metrics", i], f"there is a score '{score.name}' already")
        taken.add(score.name)
        yield score


def _made(recipe: Recipe, entry: MetricEntry, info: DataInfo, place: Sequence[str | int]) -> Score:
    """Build the score of an entry.

    Raises:
        RecipeError: at its place.
    """
    try:
        return _metric(recipe, entry, info)
    except DataError as error:
        raise recipe.error([*place], str(error)) from None
    except ValidationError as error:
        wrong = error.errors()[0]
        raise recipe.error([*place, *wrong["loc"]], said(wrong["msg"])) from None


def _metric(recipe: Recipe, entry: MetricEntry, info: DataInfo) -> Score:
    source = recipe.plugins.metrics.get(entry.use)
    if source is None:
        return _of_torchmetrics(recipe, entry, info)
    if not serves(source.tasks, recipe.task):
        raise DataError(
            f"'{entry.use}' is for {' and '.join(sorted(source.tasks))}, not for task"
            f" '{recipe.task.name}'"
        )
    return source(source.Options(**entry.arguments)).score(recipe.task, info)


def _of_torchmetrics(recipe: Recipe, entry: MetricEntry, info: DataInfo) -> Score:
    """Build a score from a torchmetrics class, which receives those of the task's arguments that it
    accepts.
    """
    found = _classes()
    if entry.use not in found:
        known = [*recipe.plugins.metrics, *found]
        hint = suggest(entry.use, known)
        raise DataError(f"'{entry.use}' is no metric plugin, nor a class of torchmetrics; {hint}")
    _refuse_other_rows(recipe, entry.use, found)
    made = found[entry.use]
    takes = _parameters(made)
    arguments = {
        **{k: v for k, v in recipe.task.metric_arguments(info).items() if k in takes},
        **entry.arguments,
    }

    def build() -> Any:
        return made(**arguments)

    try:
        metric = build()
    except Exception as error:  # metrics raise errors of any type
        raise DataError(
            f"'{entry.use}' does not take these arguments: {one_line(str(error))}"
        ) from None
    told = ", ".join(f"{key} {value}" for key, value in entry.arguments.items())
    return Score(
        name="_".join([entry.use, *(f"{key}={value}" for key, value in entry.arguments.items())]),
        sees=recipe.task.seen,
        title=f"{entry.use} ({told})" if told else entry.use,
        build=build,
        digits=4,
        higher_is_better=metric.higher_is_better is not False,
        meaning=f"torchmetrics' {entry.use}",
    )


def _refuse_other_rows(recipe: Recipe, name: str, classes: Collection[str]) -> None:
    """Check that a class of torchmetrics is for what the task's rows are, as its name says. One for
    classes computes a number of labels too, which means nothing.

    Raises:
        DataError: it is not.
    """
    task = recipe.task
    for prefix, rows in NAMED_FOR.items():
        if name.startswith(prefix) and task.rows_are != rows:
            others = [
                name.replace(prefix, other)
                for other in NAMED_FOR
                if NAMED_FOR[other] == task.rows_are
            ]
            hint = "".join(f"; did you mean '{other}'?" for other in others if other in classes)
            says = f"'{name}' is for {rows}, and task '{task.name}' has rows of {task.rows_are}"
            raise DataError(f"{says}{hint}")


def _classes() -> dict[str, type]:
    """Return the classes of torchmetrics by name."""
    from torchmetrics import Metric, classification, regression, segmentation

    values = {
        name: getattr(module, name)
        for module in (classification, regression, segmentation)
        for name in module.__all__
    }
    return {
        name: value
        for name, value in values.items()
        if inspect.isclass(value) and issubclass(value, Metric)
    }


def _parameters(made: type) -> Sequence[str]:
    """List the parameters a metric is created with; some metrics choose their class in
    `__new__`.
    """
    own = vars(made).get("__new__")
    return [*inspect.signature(own.__func__ if own else made).parameters]
