"""The output of `kdkit plugins`, and of `kdkit layers` for a model outside a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from kdkit.cli.console import out
from kdkit.contracts.dataset_source import DatasetSource
from kdkit.contracts.inputs import Shape, TextShape, as_image, is_text, parse_shape
from kdkit.contracts.layer_rows import LayerRow, tappable_layers
from kdkit.contracts.loss import Loss
from kdkit.contracts.task import Task, serves
from kdkit.errors import ModelError, PluginError, suggest
from kdkit.recipe import registry
from kdkit.recipe.catalogue import KINDS, Entry, entries
from kdkit.recipe.explain import validated
from kdkit.recipe.types import source_of
from kdkit.recipe.yaml_source import nested, parse_overrides

TOKENS_SHOWN = 16  # length of texts if none is given


def layers(
    model: str, words: Sequence[str], outputs: int, size: str, plugins: tuple[Path, ...] = ()
) -> list[LayerRow]:
    """List the layers of `model`, built on the meta device with `key=value` options for images or
    texts of `size`, in the form of `parse_shape`.

    Raises:
        ModelError: no such model, or it does not take such images or options.
    """
    sources = registry.load(plugins).models
    source, name = source_of(model, sources)
    shape = parse_shape(size)
    kind, said = sources[source].Options, {**nested(parse_overrides(words)), "model": model}
    options = validated(kind, said, model, ModelError)
    builder = sources[source](options, name)
    if builder.takes == "texts":
        taken: Shape = shape if is_text(shape) else TextShape((TOKENS_SHOWN,))
    else:
        # A network may take another number of channels than the images have: the adapter comes
        # before it.
        channels, *sides = as_image(shape)
        taken = (builder.in_channels(channels), *sides)
    # Shapes are all that is shown, also of networks that are too large for this machine.
    with torch.device("meta"):
        module = builder.build(outputs, taken)
    return tappable_layers(module, taken)


def tell_all(plugins: registry.Registry, task: str | None = None) -> None:
    """Print a table of the plugins, or of those that fit a task."""
    table = Table(
        "name", "kind", "knowledge/scheme", "what it is", "from", box=None, pad_edge=False
    )
    for entry in _entries(plugins, task):
        table.add_row(entry.name, entry.kind, entry.group, entry.summary, entry.source)
    out.print(table)


def tell_one(plugins: registry.Registry, name: str, task: str | None = None) -> None:
    """Print what every plugin of that name computes, its paper and its options.

    Raises:
        PluginError: there is none.
    """
    found = _entries(plugins, task)
    chosen = [entry for entry in found if entry.name == name]
    if not chosen:
        raise PluginError(
            f"no plugin is called '{name}'; {suggest(name, (entry.name for entry in found))}"
        )
    for entry in chosen:
        out.print(
            f"{entry.name}: {entry.group} {entry.kind}\n{entry.summary}\n\n"
            f"{entry.details}".rstrip(),
            markup=False,
        )
        if entry.paper:
            out.print(f"\n{entry.paper}", markup=False)
        table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
        for one in entry.options:
            table.add_row(one.name, one.type, one.default, one.description)
        if entry.options:
            out.print()
            out.print(table)
        out.print(f"\nfrom {entry.origin}", markup=False)


def _entries(plugins: registry.Registry, task: str | None) -> list[Entry]:
    found = list(entries(plugins))
    if task is None:
        return found
    fits = fitting(plugins, task)
    return [entry for entry in found if (entry.kind, entry.name) in fits]


def fitting(plugins: registry.Registry, task: str) -> set[tuple[str, str]]:
    """Find the plugins that fit a task, as (kind, name): by the tasks that they declare,
    datasets by the task of their targets; others fit any.

    Raises:
        PluginError: there is no such task.
    """
    if task not in plugins.tasks:
        raise PluginError(f"no task is called '{task}'; {suggest(task, plugins.tasks)}")
    wanted = plugins.tasks[task]()
    return {(KINDS[kind], plugin.name) for kind, plugin in plugins if _fits(plugin, wanted)}


def _fits(plugin: registry.Plugin, task: Task) -> bool:
    if issubclass(plugin, DatasetSource):
        return plugin.task == task.name
    if issubclass(plugin, Task):
        return plugin.name == task.name
    if issubclass(plugin, Loss):
        # it may serve further tasks under other options
        return serves(plugin.for_tasks(), task)
    # model sources, balances and compressions fit any
    return serves(getattr(plugin, "tasks", "any"), task)
