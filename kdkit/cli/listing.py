"""What `kdkit layers` shows of a model that no recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from kdkit.contracts.inputs import Shape, as_image, is_text, parse_shape
from kdkit.contracts.layers import LayerRow, tappable_layers
from kdkit.errors import ModelError
from kdkit.recipe import registry
from kdkit.recipe.explain import explain
from kdkit.recipe.types import source_of
from kdkit.recipe.yaml_source import nested, parse_overrides

TOKENS_SHOWN = 16  # where nobody says how long texts are


def layers(
    model: str, words: Sequence[str], num_classes: int, size: str, plugins: tuple[Path, ...] = ()
) -> list[LayerRow]:
    """The layers of `model`, built on the meta device with `key=value` options for images or
    texts of `size`, as `parse_shape` reads it.

    Raises:
        ModelError: no such model, or it does not take such images or options.
    """
    sources = registry.load(plugins).models
    source, name = source_of(model, sources)
    shape = parse_shape(size)
    kind, said = sources[source].Options, {**nested(parse_overrides(words)), "model": model}
    try:
        options = kind.model_validate(said)
    except ValidationError as error:
        raise ModelError(explain(error, kind, said, lambda _: model)) from None
    builder = sources[source](options, name)
    if builder.takes == "texts":
        taken: Shape = shape if is_text(shape) else (TOKENS_SHOWN,)
    else:
        channels, *sides = as_image(shape)
        taken = (builder.in_channels(channels), *sides)
    with torch.device("meta"):
        module = builder.build(num_classes, taken)
    return tappable_layers(module, taken)
