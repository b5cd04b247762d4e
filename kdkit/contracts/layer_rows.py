"""Lists the layers of a network that a recipe can name, with the shapes of their outputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts.inputs import Shape, answered, kind_of, random_inputs
from kdkit.contracts.layers import INPUT, classifier_path, kept_layers, stage_paths
from kdkit.contracts.records import Inputs
from kdkit.errors import TapError


@dataclass(frozen=True)
class LayerRow:
    """One line of `kdkit layers`: path, class, shape of the output, aliases."""

    name: str
    type: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()


def tappable_layers(module: nn.Module, shape: Shape) -> list[LayerRow]:
    """List the layers that return one tensor, with shapes for two samples, in order.

    Runs a copy of the network without data (meta device); one that needs data is run on zeros.

    Raises:
        TapError: the network cannot take inputs of that shape.
    """
    # on the meta device shapes cost nothing; a copy, whose hooks need not be removed either
    shadow = copy.deepcopy(module).to("meta").eval()
    try:
        shapes = _shapes(shadow, random_inputs(shape, 2, "meta"))
    # some operations have no meta kernel, or read values of tensors
    except (RuntimeError, NotImplementedError):
        shapes = _shapes_on_zeros(shadow, shape)
    aliases: dict[str, list[str]] = {"": ["logits"]}
    for number, path in enumerate(stage_paths(module), 1):
        aliases.setdefault(path, []).append(f"stage{number}")
    modules = dict(module.named_modules())
    names = {path: name for name, path in (kept_layers(module) or {}).items()}
    rows = [
        LayerRow(
            names.get(path, path), type(modules[path]).__name__, size, tuple(aliases.get(path, ()))
        )
        for path, size in shapes.items()
    ]
    return [*rows, *_embedding(module, modules)]


def _embedding(module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[LayerRow]:
    """Find the classifier's input, if the network has exactly one classifier."""
    # no single classifier, so no `penultimate` alias
    with contextlib.suppress(TapError):
        path = classifier_path(module)
        if (width := getattr(modules[path], "in_features", None)) is not None:
            yield LayerRow(
                f"{path}{INPUT}", "input of the classifier", (2, width), ("penultimate",)
            )


def _shapes(module: nn.Module, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    seen: dict[str, tuple[int, ...]] = {}

    def watch(path: str) -> Any:
        def hook(child: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                seen[path] = tuple(output.shape)

        return hook

    for path, child in module.named_modules():
        child.register_forward_hook(watch(path))
    with torch.no_grad():
        answered(module, inputs)
    # hooks fire at the end of a module, so an outer one comes after what it contains
    return {path: seen[path] for path, _ in module.named_modules() if path in seen}


def _shapes_on_zeros(module: nn.Module, shape: Shape) -> dict[str, tuple[int, ...]]:
    real = module.to_empty(device="cpu")
    for value in (*real.parameters(), *real.buffers()):
        value.data.zero_()  # zeros are also valid if a buffer is used as an index
    try:
        return _shapes(real, random_inputs(shape, 2))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise TapError(
            f"the network does not take {kind_of(shape)} of {shape}: {' '.join(str(error).split())}"
        ) from error
