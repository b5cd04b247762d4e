"""Builds the network that a recipe names, with its weights, its input adapter and its taps."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdkit.errors import ModelError, TapError
from kdkit.finite import faulty_weight
from kdkit.layers import classifier_path
from kdkit.normalization import InputAdapter, NormalizationAdapter
from kdkit.providers import ModelOptions, ModelSource, Normalize
from kdkit.shapes import Shape, is_text, kind_of
from kdkit.tapping import TappedModel

DEPTH = 3  # of nests in nests: a file may hold itself
NESTS = ("state_dict", "model", "model_state_dict", "state_dict_ema")  # where training scripts keep weights within a checkpoint


def build_model(
    options: ModelOptions,
    source: ModelSource,
    num_classes: int,
    image_shape: Shape,
    layers: Iterable[str] = (),
    role: str = "model",
    *,
    weights: bool = True,
    load: bool = True,
    file: Path | None = None,
    device: torch.device | None = None,
    needs_logits: bool = True,
    channels_last: bool = False,
    precision: torch.dtype | None = None,
) -> TappedModel:
    """The network with its weights, adapted to the batches and observed at `layers`. Random weights are drawn from the current stream.

    Args:
        options: the recipe's section.
        source: who builds networks of that kind, with the same options.
        num_classes: number of logits.
        image_shape: (C, H, W) of the images in a batch, in [0, 1]; (N,) of texts.
        layers: names of the layers to observe.
        role: "teacher resnet18": how messages begin.
        weights: False builds it on the meta device: shapes only, nothing is read or downloaded.
        load: False leaves the weights random: nothing is read or downloaded.
        file: weights that take the place of the recipe's, such as another run's student.
        device: where the model goes once it is built; random weights do not depend on it.
        needs_logits: see `TappedModel`.
        channels_last: see `TappedModel`.
        precision: see `TappedModel`.

    Raises:
        ModelError: no such model, a checkpoint that does not fit, images that do not fit.
        TapError: no such layer.
    """
    try:
        shape = _own_shape(options, source, image_shape)
        with contextlib.nullcontext() if weights else torch.device("meta"):
            module = source.build(num_classes, shape)
            adapt = _adapter(options, source, module, image_shape, shape)
        if options.new_head and not file:
            _head(module, num_classes)  # that there is none is told where no weights are read, too
        if weights and load:
            _load(options, source, module, num_classes, file)
            if faulty := faulty_weight(module):
                whence = file or options.checkpoint or f"the {source.name} model"
                raise ModelError(f"{whence}: the weights are not finite: {faulty}")
        if weights:
            module.to(device)
        adapt.to(device if weights else "meta")
    except ModelError as error:
        raise ModelError(f"{role}: {error}") from error
    return TappedModel(
        module,
        layers,
        adapt=adapt,
        role=role,
        num_classes=num_classes,
        needs_logits=needs_logits,
        channels_last=channels_last,
        precision=precision,
        input_shape=shape,
    )


def load_checkpoint(
    path: Path, module: nn.Module, strip_prefix: str = "", num_classes: int | None = None, rename: Callable[[str], str] | None = None,
    *, new_head: bool = False,
) -> None:  # fmt: skip
    """Load a checkpoint's weights into a network. No code that the file may hold is run.

    Args:
        path: the file.
        module: the network.
        strip_prefix: what to drop from the file's keys.
        num_classes: number of logits, for the message when the file is of another number.
        rename: the network's own name of a key, once the prefix is dropped (None: the same).
        new_head: leave the file's classifier out; the network's own stays as it is.

    Raises:
        ModelError: the file is missing, holds more than tensors, or does not fit; the network is then unchanged.
    """
    found: dict[str, Tensor] = {}
    for key, value in read_weights(path).items():
        plain = key.removeprefix(strip_prefix)
        own = rename(plain) if rename else plain
        if own in found:
            raise ModelError(f"{path} does not fit: several of its keys mean '{own}'")
        found[own] = value
    wanted = module.state_dict()
    if new_head:
        head = _head(module, num_classes)
        found, wanted = ({k: v for k, v in weights.items() if not k.startswith(f"{head}.")} for weights in (found, wanted))
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = sorted(key for key in found if key not in wanted)
    reshaped = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    if reshaped and not missing and not unexpected:
        _refuse_other_classes(path, module, reshaped, found, num_classes)
    if missing or unexpected or reshaped:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        counts = [
            f"{len(keys)} keys {kind} ({', '.join([*keys[:3], *['...'][: max(0, len(keys) - 3)]])})" for kind, keys in kinds.items() if keys
        ]
        raise ModelError(f"{path} does not fit: {'; '.join(counts)}{_prefix_hint(found, wanted) if missing else ''}")
    module.load_state_dict(found, strict=False)  # checked above; old files lack BatchNorm's counters


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors or torch file, also where a training script nested them.

    Raises:
        ModelError: the file is missing, broken, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(f"{path}: no checkpoint, or holds more than tensors; code in a file is never run: save a state_dict()") from None
    except Exception as error:  # whatever a broken file makes a reader raise
        raise ModelError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    for _ in range(DEPTH):
        if isinstance(content, Mapping) and (nest := next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)):
            content = content[nest]
    if not isinstance(content, Mapping) or not content or not all(map(_is_plain, content.values())):
        raise ModelError(f"{path}: holds no weights: a mapping of tensors, at the top or under {', '.join(NESTS)}")
    return {str(key): value for key, value in content.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with a number for each of its places."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _load(options: ModelOptions, source: ModelSource, module: nn.Module, num_classes: int, file: Path | None) -> None:
    if file:
        load_checkpoint(file, module, num_classes=num_classes)
    elif options.checkpoint:
        rename = functools.partial(source.rename, module=module)
        load_checkpoint(options.checkpoint, module, options.strip_prefix, num_classes, rename, new_head=options.new_head)
    else:
        source.load(module)


def _own_shape(options: ModelOptions, source: ModelSource, shape: Shape) -> Shape:
    """What the network itself takes."""
    if kind_of(shape) != source.takes:
        raise ModelError(f"'{source.name}' builds networks for {source.takes}, and the data are {kind_of(shape)}")
    if is_text(shape):
        return shape
    channels, side = source.in_channels(shape[0]), options.input_size
    return (channels, side, side) if side else (channels, *shape[1:])


def _adapter(options: ModelOptions, source: ModelSource, module: nn.Module, shape: Shape, own: Shape) -> nn.Module:
    """From batches to what the network takes; texts are given as they are."""
    if not is_text(shape):
        return _input_adapter(options, source.normalization(module), shape[0], own[0])
    if options.normalize or options.input_size:
        raise ModelError("normalize and input_size are for images, and the data are texts")
    return nn.Identity()


def _input_adapter(options: ModelOptions, own: Normalize | None, image_channels: int, channels: int) -> InputAdapter:
    if options.normalize:
        wanted = options.normalize
        if {len(wanted.mean), len(wanted.std)} - {1, channels}:
            raise ModelError(f"normalize has {len(wanted.mean)} means and {len(wanted.std)} deviations for {channels} channels")
    else:
        wanted = own or Normalize(mean=(0.0,), std=(1.0,))
    adapter = NormalizationAdapter(0.0, 1.0, _fit(wanted.mean, channels), _fit(wanted.std, channels))
    adapter(torch.empty(1, image_channels, 1, 1, device=adapter.scale.device))  # raises where the channels cannot be adapted
    return InputAdapter(adapter, options.input_size, options.interpolation)


def _fit(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel; colour values become their mean where the network takes another number of channels."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _head(module: nn.Module, num_classes: int | None) -> str:
    """Path of the classifier that a checkpoint's would replace.

    Raises:
        ModelError: there is no single one.
    """
    try:
        return classifier_path(module, num_classes)
    except TapError:
        raise ModelError("new_head: this network has no single linear classifier, so none can be left out of its checkpoint") from None


def _refuse_other_classes(path: Path, module: nn.Module, keys: list[str], found: Mapping[str, Tensor], num_classes: int | None) -> None:
    with contextlib.suppress(TapError):
        head = classifier_path(module, num_classes)
        if all(key.startswith(f"{head}.") for key in keys):
            says = f"{path} is a classifier ('{head}') of {found[keys[0]].shape[0]} classes, not of {num_classes or 'as many'}"
            raise ModelError(f"{says}; `new_head: true` leaves it out and begins with a random one")


def _prefix_hint(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    first = next(iter(wanted), "")
    prefix = next((key.removesuffix(first) for key in found if first and key.endswith(f".{first}")), "")
    fits = sum(key.startswith(prefix) and key.removeprefix(prefix) in wanted for key in found)
    return f"; with `strip_prefix: {prefix}` {fits} of {len(wanted)} keys would fit" if prefix else ""
