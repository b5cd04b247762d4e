"""A new study of a recipe: its student alone, and with each kind of its teacher's knowledge."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from kdkit.errors import KdkitError, RecipeError
from kdkit.start.datasets import relative
from kdkit.start.recipes import RECIPES, written
from kdkit.start.tasks import TASKS
from kdkit.start.writing import filled, flow, refuse_existing

if TYPE_CHECKING:
    from kdkit.recipe import Recipe


def write(base: Path, output: Path, seeds: int, name: str | None = None) -> list[Path]:
    """Write a study of a recipe; a kind of knowledge that `kdkit check` refuses is left out.

    Raises:
        KdkitError: the recipe is wrong, or has no teacher to study; nothing is written.
        OSError: the file exists already, or cannot be written.
    """
    if output.suffix not in RECIPES:
        raise RecipeError(f"--output: {output}: write a file .yaml")
    refuse_existing({output: ""})
    from kdkit import recipe
    from kdkit.study import loading

    loaded = recipe.load(base)
    task = loaded.task.name
    if not loaded.spec.all_teachers():
        raise RecipeError(f"{base}: has no teacher; a study of knowledge needs a recipe that has")
    if task not in TASKS:
        raise RecipeError(
            f"{base}: no study is prepared for task '{task}', but for {', '.join(TASKS)}"
        )
    labels = _losses_on_labels(loaded)
    values = {
        "name": flow(name or re.sub(r"[^A-Za-z0-9._-]+", "_", f"{loaded.spec.name}_knowledge")),
        "file": output.name,
        "base": flow(relative(base, output.parent)),
        "seeds": str(seeds),
        "label_losses": ", ".join(map(flow, labels)),
        "variants": "\n".join(_variants(base, loaded, labels)),
    }
    with written({output: filled("study.yaml", values)}):
        loading.load([output])
    return [output]


def _losses_on_labels(loaded: Recipe) -> list[dict[str, Any]]:
    """List the recipe's own losses on labels, or the task's usual one, as a recipe says them."""
    losses = loaded.plugins.losses
    own = [
        {"use": entry.use, **entry.model_dump(mode="json", by_alias=True, exclude_unset=True)}
        for entry in loaded.spec.losses
        if losses[entry.use].knowledge == "labels"
    ]
    usual: dict[str, Any] = yaml.safe_load(TASKS[loaded.task.name].label_loss)
    return own or [usual]


def _variants(base: Path, loaded: Recipe, labels: list[dict[str, Any]]) -> list[str]:
    """Return a line for each kind of knowledge, with the losses or why it is left out."""
    from kdkit import recipe
    from kdkit.runs import checks
    from kdkit.start.stages import last_stages

    stages, lines = last_stages(loaded), []
    for knowledge, text in TASKS[loaded.task.name].losses.items():
        losses = [*labels, *yaml.safe_load(f"[{Template(text).substitute(stages)}]")]
        try:
            checks.make(recipe.load(base, {"losses": losses}))
        except KdkitError as error:
            lines.append(f"  # {knowledge} is left out: {' '.join(str(error).split())}")
        else:
            lines.append(f"  {knowledge}: {flow({'losses': losses})}")
    if all(line.startswith("  #") for line in lines):
        raise RecipeError(f"{base}: {lines[0].partition(': ')[2]}; nothing is written")
    return lines
