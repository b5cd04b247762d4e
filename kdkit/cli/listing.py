"""The output of `kdkit layers` for a model outside a recipe; the plugins that fit a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kdkit.contracts.dataset_source import DatasetSource
from kdkit.contracts.inputs import Shape, TextShape, as_image, is_text, parse_shape
from kdkit.contracts.layers import LayerRow, tappable_layers
from kdkit.contracts.loss import Loss
from kdkit.contracts.metric_source import MetricSource
from kdkit.contracts.schedule import Schedule
from kdkit.contracts.task import Task, serves
from kdkit.errors import ModelError, PluginError, suggest
from kdkit.recipe import registry
from kdkit.recipe.catalogue import KINDS
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


def fitting(plugins: registry.Registry, task: str) -> set[tuple[str, str]]:
    """Find the plugins that fit a task, as (kind, name): losses, schedules and metrics by the tasks
    that they declare, datasets by the task of their targets; model sources and balances fit any.

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
    return serves(plugin.tasks, task) if issubclass(plugin, Schedule | MetricSource) else True
