"""The functions for scripts: those of the command line, which return values instead of printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkit import recipe
from kdkit.contracts.loss import Loss
from kdkit.contracts.options import Ramp
from kdkit.errors import PluginError, suggest
from kdkit.recipe import registry
from kdkit.recipe.explain import validated
from kdkit.runs import checks, training
from kdkit.runs.plan import Plan
from kdkit.runs.result import Result
from kdkit.study import comparison, loading
from kdkit.study.findings import Findings


def train(
    path: Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path | str] = (),
    folder: Path | str | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Result:
    """Run a recipe file, or what is left of it.

    Args:
        path: the recipe.
        overrides: values by key path, such as `{"train.epochs": 3, "losses.1.temperature": 2}`.
        plugins: further plugin files or folders.
        folder: the run folder (default: `run.folder`/`name`).
        restart: delete the content of the folder and start over.
        quiet: print warnings only.

    Raises:
        RecipeError: the recipe is wrong; all problems, one a line.
        RunError: the folder is another recipe's, or a loss is not finite.
        Interrupted: a signal stopped it; the state is saved, and another call resumes.
    """
    loaded = recipe.load(path, overrides, _paths(plugins))
    return training.train(loaded, Path(folder) if folder else None, restart=restart, quiet=quiet)


def check(
    path: Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path | str] = (),
) -> Plan:
    """Determine what a recipe would do, without doing it.

    Raises:
        RecipeError: what cannot work, one problem a line.
    """
    return checks.make(recipe.load(path, overrides, _paths(plugins)))


def compare(
    *paths: Path | str,
    seeds: int | None = None,
    allow: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path | str] = (),
    max_parallel: int | None = None,
) -> Findings | None:
    """Run a study, or what is left of it: train and measure every variant with every seed.

    Args:
        *paths: a study file, or recipes (the first is the baseline).
        seeds: number of seeds, in place of the study's own.
        allow: keys in which variants may differ although they are not what is compared.
        overrides: values by key path, for all variants.
        plugins: further plugin files or folders.
        max_parallel: runs in memory at once (None: all that share data and seed).

    Returns:
        The findings; None in all processes of a launch but the first.

    Raises:
        RecipeError: the study or a recipe is wrong, or the comparison would not be fair; all
            problems, one a line.
        Interrupted: a signal stopped it; everything is saved, and another call resumes.
    """
    loaded = loading.load(
        [Path(path) for path in paths], overrides, _paths(plugins), seeds=seeds, allow=allow
    )
    return comparison.compare(loaded, max_parallel=max_parallel)


def build_loss(name: str, *, plugins: Sequence[Path | str] = (), **options: Any) -> Loss:
    """Build a loss for your own loop: `setup(student, teacher)` once, then call it per batch.

    Args:
        name: as `kdkit plugins` lists it.
        plugins: further plugin files or folders.
        **options: the loss's own.

    Raises:
        PluginError: no such loss, or it has no such option.
    """
    losses = registry.load(_paths(plugins)).losses
    if name not in losses:
        raise PluginError(f"no loss is called '{name}'; {suggest(name, losses)}")
    chosen = validated(losses[name].Options, options, name, PluginError)
    if ramps := [key for key, value in chosen if isinstance(value, Ramp)]:
        raise PluginError(
            f"{name}: {ramps[0]}: a ramp needs the engine, which knows the epoch; give a number"
        )
    return losses[name](chosen)


def _paths(plugins: Sequence[Path | str]) -> tuple[Path, ...]:
    return tuple(Path(path).expanduser().resolve() for path in plugins)
