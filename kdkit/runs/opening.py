"""Opens the data that a recipe names."""

from __future__ import annotations

import functools
from dataclasses import replace

from accelerate import Accelerator

from kdkit.data import loaders
from kdkit.data.mixing import MixedLoader
from kdkit.data.mixing import options_of as mixing_options
from kdkit.errors import DataError
from kdkit.recipe import Recipe
from kdkit.runs.shared import Alone, Shared


def open_data(
    recipe: Recipe, accelerator: Accelerator, shared: Shared | None = None
) -> loaders.Data:
    """Open the recipe's data, this process's share of it, mixed if the recipe says so."""
    shared = shared or Alone()
    opened = shared.opened(functools.partial(read_data, recipe, accelerator))
    if (spec := recipe.spec.train.mixup) is None:
        return opened
    mixed = functools.partial(
        MixedLoader,
        spec=spec,
        mix=recipe.task.mixer(mixing_options(spec), opened.info),
        seed=recipe.spec.seed,
        rank=accelerator.process_index,
    )
    return replace(opened, train=shared.changed(f"mixed {spec!r}", opened.train, mixed))


def read_data(recipe: Recipe, accelerator: Accelerator) -> loaders.Data:
    """Read the recipe's data without mixing."""
    spec = recipe.spec
    source = recipe.dataset()
    rank, world = accelerator.process_index, accelerator.num_processes
    try:
        with accelerator.local_main_process_first():  # it may download
            return loaders.prepare(
                spec.data,
                source,
                recipe.task,
                seed=spec.seed,
                device=accelerator.device,
                rank=rank,
                world=world,
                unlabelled=recipe.unlabelled(),
            )
    except DataError as error:
        raise recipe.error(["data"], str(error)) from error
