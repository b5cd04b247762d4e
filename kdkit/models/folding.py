"""Folds BatchNorm layers of a frozen network into convolutions: equal up to rounding."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkit.contracts.inputs import Shape, answered, moved, random_inputs
from kdkit.contracts.layers import resolve
from kdkit.contracts.records import Inputs
from kdkit.errors import ModelError
from kdkit.models.devices import device_of
from kdkit.models.tapped import TappedModel

ModelT = TypeVar("ModelT", TappedModel, nn.Module)

BATCH_NORM = nn.modules.batchnorm._BatchNorm
TOLERANCE = 1e-4  # relative to the largest output: a few hundred roundings of fp32


def fold_batchnorm(
    model: ModelT, probe: Inputs | Shape, keep: Iterable[str] = (), *, in_place: bool = False
) -> ModelT:
    """Fold each BatchNorm whose input is one convolution's output, read by nothing else.

    Pairs are found by watching one forward on the probe, so names and registration order do not
    matter. The module tree keeps its structure: an Identity (or the operations of timm's
    BatchNormAct2d after normalising) replaces the BatchNorm.

    Args:
        model: a network, or a tapped one, whose own taps are preserved too; the result is in eval
            mode and without gradients.
        probe: a batch (B, C, H, W) or mapping that the model takes, or the shape of one, to be
            drawn at random.
        keep: layers that are observed; a pair that contains one of them is not folded.
        in_place: change the model itself; otherwise the result shares no tensor with it.

    Raises:
        ModelError: the network normalises by batch statistics, or the folded one answers
            differently.
    """
    model = model if in_place else copy.deepcopy(model)
    module = model.module if isinstance(model, TappedModel) else model
    if any(
        isinstance(layer, BATCH_NORM) and layer.training and not layer.track_running_stats
        for layer in module.modules()
    ):
        raise ModelError("BatchNorm that uses batch statistics (`mode: train`) cannot be folded")
    module.eval().requires_grad_(False)
    observed = {resolve(name, module).path for name in keep}
    batch = (
        probe
        if isinstance(probe, Tensor | Mapping)
        else moved(random_inputs(probe, 2), device_of(module))
    )
    if isinstance(model, TappedModel):
        observed |= {layer.path for layer in model.layers.values()}
        batch = model.adapt(batch)
    with torch.no_grad():
        before, pairs = _probe(module, batch)
        for conv, norm in pairs:
            if conv not in observed and norm not in observed:
                _fold(module, conv, norm)
        _compare(before, _answers(answered(module, batch)))
    return model


def unfoldable(network: nn.Module, layers: Iterable[str], outputs: int | None = None) -> list[str]:
    """List the observed layers that prevent folding: convolutions and BatchNorms themselves."""
    paths = {resolve(layer, network, outputs).path for layer in layers}
    return sorted(
        path
        for path in paths
        if isinstance(network.get_submodule(path), nn.modules.conv._ConvNd | BATCH_NORM)
    )


@dataclass
class _Sighting:
    """The convolutions and BatchNorm layers that one probe forward shows."""

    # by id; the tensor is kept alive, otherwise its id could be reused
    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    fed: list[tuple[str, str]] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    readers: Counter[int] = field(default_factory=Counter)
    unfit: set[str] = field(default_factory=set)
    paused: bool = False


class _Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read a convolution's output, inside layers and between them.

    Hooks see only what modules read, not an addition between them.
    """

    def __init__(self, sighting: _Sighting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sighting = sighting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.sighting.paused:
            for value in tree_leaves((args, kwargs or {})):
                if id(value) in self.sighting.outputs:
                    self.sighting.readers[id(value)] += 1
        return func(*args, **(kwargs or {}))


def _probe(module: nn.Module, probe: Inputs) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """Return the answer to the probe, and the (convolution, BatchNorm) pairs that can be folded."""
    seen = _Sighting()
    names = {layer: path for path, layer in module.named_modules()}
    owners = Counter(id(value) for layer in names for value in layer.parameters(recurse=False))

    def after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name, seen.paused = names[layer], True  # the checks below read tensors too
        seen.runs[name] += 1
        if isinstance(layer, nn.modules.conv._ConvNd):
            seen.outputs[id(output)] = (name, output)
            fits = _is_linear_in_its_weight(layer, args, output)
        else:
            if id(args[0]) in seen.outputs:
                seen.fed.append((seen.outputs[id(args[0])][0], name))
            fits = _is_normalisation(layer, args[0], output)
        # folding would change the other owner of a shared weight
        if not fits or any(owners[id(value)] > 1 for value in layer.parameters(recurse=False)):
            seen.unfit.add(name)
        seen.paused = False

    watched = [layer for layer in names if isinstance(layer, nn.modules.conv._ConvNd | BATCH_NORM)]
    handles = [layer.register_forward_hook(after) for layer in watched]
    try:
        with _Readers(seen):
            answer = _answers(answered(module, probe))
    finally:
        for handle in handles:
            handle.remove()
    shared = {name for key, (name, _) in seen.outputs.items() if seen.readers[key] != 1}
    pairs = [
        (conv, norm)
        for conv, norm in seen.fed
        if seen.runs[conv] == seen.runs[norm] == 1
        and not seen.unfit & {conv, norm}
        and conv not in shared
    ]
    return answer, pairs


def _is_linear_in_its_weight(conv: Any, args: tuple[Tensor, ...], output: Tensor) -> bool:
    """Check whether twice the weight gives twice the output, as standardised ones do not.

    Transposed convolutions are excluded: their weights have another layout.
    """
    weight = conv._parameters.get("weight")
    if weight is None or conv.transposed or nn.utils.parametrize.is_parametrized(conv):
        return False
    offset = 0 if conv.bias is None else conv.bias.view(1, -1, *[1] * (output.ndim - 2))
    weight.mul_(2)  # doubling and halving are exact
    doubled = type(conv).forward(conv, *args)
    weight.div_(2)
    return bool(
        torch.allclose(
            doubled - offset,
            2 * (output - offset),
            rtol=1e-4,
            atol=1e-5 * float(output.abs().max()),
        )
    )


def _is_normalisation(norm: Any, features: Tensor, output: Tensor) -> bool:
    """Check whether the layer normalises by running statistics and then runs its children."""
    # without running statistics it normalises by each batch, also in eval mode
    if norm.running_mean is None:
        return False
    # subclasses may do something else, so what it computes is compared
    plain = F.batch_norm(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    return bool(torch.allclose(_rest(norm)(plain), output, rtol=1e-4, atol=1e-5))


def _rest(norm: nn.Module) -> nn.Module:
    """Return the operations of the layer after normalising."""
    rest = nn.Sequential()
    for name, child in norm.named_children():
        rest.add_module(name, child)  # by the same names, so that `bn1.act` stays a path
    return rest.eval() if len(rest) else nn.Identity().eval()


def _fold(module: nn.Module, conv_path: str, norm_path: str) -> None:
    conv: Any = module.get_submodule(conv_path)
    norm: Any = module.get_submodule(norm_path)

    # in double precision, so that the weights are rounded once
    def double(value: Any) -> Any:
        return None if value is None else value.double()

    fused = fuse_conv_bn_weights(
        conv.weight.double(),
        double(conv.bias),
        double(norm.running_mean),
        double(norm.running_var),
        norm.eps,
        double(norm.weight),
        double(norm.bias),
    )
    kind = conv.weight.dtype
    conv.weight, conv.bias = (nn.Parameter(value.to(kind), requires_grad=False) for value in fused)
    parent, _, name = norm_path.rpartition(".")
    setattr(module.get_submodule(parent), name, _rest(norm))


def _answers(output: Any) -> list[Tensor]:
    return [value.clone() for value in tree_leaves(output) if isinstance(value, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        largest = float(old.abs().max())
        error = float((new - old).abs().max())
        # `not <=`, so that NaN counts as a difference
        if not error <= TOLERANCE * max(largest, 1e-3):
            raise ModelError(
                f"folding BatchNorm changes this network's answer by {error:.2g} (largest"
                f" {largest:.2g}): leave it unfolded"
            )
