"""What `kdkit layers` shows of a model that no recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from kdkit import registry
from kdkit.errors import ModelError
from kdkit.layers import LayerRow, tappable_layers
from kdkit.recipe_types import source_of
from kdkit.source import nested, parse_overrides


def layers(model: str, words: Sequence[str], num_classes: int, size: str, plugins: tuple[Path, ...] = ()) -> list[LayerRow]:
    """The layers of `model`, built on the meta device with `key=value` options for images of `size` "C,H,W".

    Raises:
        ModelError: no such model, or it does not take such images or options.
    """
    sources = registry.load(plugins).models
    source, name = source_of(model, sources)
    try:
        shape = tuple(int(side) for side in size.split(","))
        channels, height, width = shape
    except ValueError:
        raise ModelError(f"--size: '{size}' is not of the form C,H,W, such as 3,224,224") from None
    try:
        options = sources[source].Options(model=model, **nested(parse_overrides(words)))
    except ValidationError as error:
        raise ModelError("\n".join(f"{model}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
    builder = sources[source](options, name)
    size_taken = (builder.in_channels(channels), height, width)
    with torch.device("meta"):
        module = builder.build(num_classes, size_taken)
    return tappable_layers(module, size_taken)
