"""Builds the network that a recipe names, with its weights, its input adapter and its taps."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from kdkit.contracts.compression import Compression
from kdkit.contracts.inputs import Shape, is_text, kind_of
from kdkit.contracts.layers import NoHead, classifier_path
from kdkit.contracts.model_source import ModelOptions, ModelSource, Normalize, TeacherOptions
from kdkit.errors import CheckpointError, InputError, ModelError, TapError
from kdkit.finite import faulty_weight
from kdkit.models.compressing import begun, finished, refuse_device
from kdkit.models.normalization import InputAdapter, NormalizationAdapter
from kdkit.models.seen import Seen, SeenInput
from kdkit.models.tapped import TappedModel
from kdkit.models.weight_files import (
    Misfit,
    Weights,
    adopt_shapes,
    fit_weights,
    read_weights,
    refuse_other_classes,
)
from kdkit.randomness import seeded


def build_model(
    options: ModelOptions,
    source: ModelSource,
    outputs: int,
    image_shape: Shape,
    layers: Iterable[str] = (),
    role: str = "model",
    *,
    weights: bool = True,
    load: bool = True,
    file: Path | None = None,
    device: torch.device | None = None,
    channels_last: bool = False,
    fields: Mapping[str, int] | None = None,
    compressions: Sequence[Compression] = (),
) -> TappedModel:
    """Build the network with its weights, adapted to the batches and observed at `layers`.

    Args:
        options: the recipe's section.
        source: the source that builds such networks, with the same options.
        outputs: number of logits; 0 builds it without a head.
        image_shape: (C, H, W) of the images in a batch, in [0, 1]; (N,) of texts.
        layers: names of the layers to observe.
        role: "teacher resnet18": the beginning of messages.
        weights: False builds it on the meta device: shapes only, nothing is read or downloaded.
        load: False leaves the weights random: nothing is read or downloaded.
        file: weights that replace the recipe's, such as another run's student.
        device: device of the finished model; random weights do not depend on it.
        channels_last: see `TappedModel`.
        fields: the fields that images consist of, see `DataInfo.fields`.
        compressions: build the network that they leave after training, whose weights `file` holds.

    Raises:
        ModelError: no such model, a checkpoint that does not fit, images that do not fit.
        InputError: the samples do not have what it is to see.
        TapError: no such layer.
    """
    try:
        seen = Seen(options.input, image_shape, fields or {}) if options.input else None
        sees = seen.shape if seen else image_shape
        shape = _own_shape(options, source, sees)
        module = _built(source, outputs, shape, weights)
        _without_empty_layers(module)
        # adapters make tensors of their own, which have to be where the network is
        with contextlib.nullcontext() if weights else torch.device("meta"):
            adapt = _adapter(options, source, module, sees, shape, seen)
        if options.new_head and not file:
            _head(module, outputs)  # report a missing classifier even if no weights are read
        if compressions:
            refuse_device(compressions, device)
            module = finished(begun(module, shape, compressions), shape, compressions)
        if weights and load:
            _load(options, source, module, outputs, file)
            if faulty := faulty_weight(module):
                origin = file or options.checkpoint or f"the {source.name} model"
                raise ModelError(f"{origin}: the weights are not finite: {faulty}")
        # weights are drawn on the CPU and then moved, so that they are the same on any device
        if weights:
            module.to(device)
        adapt.to(device if weights else "meta")
    except ModelError as error:
        # an error of the same class, as callers tell a wrong file from a wrong network
        kinds = (kind for kind in (CheckpointError, InputError) if isinstance(error, kind))
        kind = next(kinds, ModelError)
        raise kind(f"{role}: {error}") from error
    return TappedModel(
        module,
        layers,
        adapt=adapt,
        role=role,
        outputs=outputs,
        channels_last=channels_last,
        input_shape=shape,
        sees=sees,
    )


def _built(source: ModelSource, outputs: int, shape: Shape, weights: bool) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # torch's, of a head for 0 classes
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            return (
                source.build(outputs, shape)
                if weights
                else _without_numbers(source, outputs, shape)
            )
    # errors from the network's own code
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        says = (str(error).strip() or "no reason given").splitlines()[0]
        raise ModelError(
            f"'{source.name}/{source.model_name}' cannot be built: {type(error).__name__}: {says}"
        ) from error


def _without_numbers(source: ModelSource, outputs: int, shape: Shape) -> nn.Module:
    """Build the network on the meta device; with numbers if its constructor needs them."""
    try:
        with torch.device("meta"):
            return source.build(outputs, shape)
    except ModelError:
        # it may need real numbers; any other error is raised again here
        return source.build(outputs, shape)


def random_weights(source: ModelSource, outputs: int, sees: Shape) -> tuple[list[str], bool]:
    """Name the tensors that a fresh network draws, and report whether it reads others.

    `sees` is the shape of what it sees of a sample.

    The random tensors are those in which two networks of different seeds differ. Tensors of one
    value only (zeros, ones) are no evidence.
    """
    shape = _own_shape(source.options, source, sees)
    builds = []
    # two, as numbers that a constructor reads are the same for every seed
    for seed in range(2):
        with seeded("drawn weights", seed):
            builds.append(_built(source, outputs, shape, weights=True).state_dict())
    drawn = [name for name, value in builds[0].items() if not torch.equal(value, builds[1][name])]
    read = any(
        name not in drawn and value.numel() and bool((value != value.flatten()[0]).any())
        for name, value in builds[0].items()
    )
    return drawn, read


def load_checkpoint(
    path: Path,
    module: nn.Module,
    strip_prefix: str = "",
    outputs: int | None = None,
    rename: Callable[[str], str] | None = None,
    *,
    new_head: bool = False,
    teaches: bool = False,
    own: bool = False,
    shapes_only: bool = False,
) -> tuple[str, ...]:
    """Load a checkpoint's weights into a network; return the notes of `fit_weights`.

    Args:
        path: the file.
        module: the network.
        strip_prefix: the prefix to drop from the file's keys.
        outputs: number of logits, for the message if the file has another number.
        rename: the network's own name of a key, once the prefix is dropped (None: the same).
        new_head: ignore the file's classifier and keep the network's own.
        teaches: whether it is a teacher, for which a random classifier is useless.
        own: whether the weights were saved from such a network: it then adopts their shapes, except
            for the number of classes.
        shapes_only: compare names and shapes only; the network may be on the meta device, and is
            not modified.

    Raises:
        CheckpointError: the file is missing, holds more than tensors, or does not fit; the network
            is then unchanged.
    """
    heads = (_head(module, outputs),) if new_head else _absent(module) if outputs == 0 else ()
    # a network may have changed its own shapes in training, by pruning for example
    if own:
        _take_shapes(module, read_weights(path), outputs)
    try:
        fitted = fit_weights(
            path, module, strip_prefix, rename, heads=heads, shapes_only=shapes_only
        )
    except Misfit as error:
        refuse_other_classes(error, path, module, outputs, teaches=teaches)
        raise
    if not shapes_only:
        # checked above; old files lack BatchNorm's counters
        module.load_state_dict(fitted.weights, strict=False)
    return fitted.notes


def _take_shapes(module: nn.Module, weights: Weights, outputs: int | None) -> None:
    # another number of classes is a mistake, which is reported, not a shape to adopt
    with contextlib.suppress(TapError):
        head = classifier_path(module, outputs)
        classes = {
            key: value for key, value in module.state_dict().items() if key.startswith(f"{head}.")
        }
        weights = {
            key: value
            for key, value in weights.items()
            if key not in classes or value.shape[:1] == classes[key].shape[:1]
        }
    adopt_shapes(module, weights)


def _load(
    options: ModelOptions,
    source: ModelSource,
    module: nn.Module,
    outputs: int,
    file: Path | None,
) -> None:
    if file:
        load_checkpoint(file, module, outputs=outputs, own=True)
    elif options.checkpoint:
        compare_checkpoint(options, source, module, outputs, shapes_only=False)
    else:
        source.load(module)


def compare_checkpoint(
    options: ModelOptions,
    source: ModelSource,
    module: nn.Module,
    outputs: int,
    *,
    shapes_only: bool = True,
) -> tuple[str, ...]:
    """Fit the recipe's checkpoint, by default by names and shapes only; see `load_checkpoint`."""
    assert options.checkpoint is not None
    return load_checkpoint(
        options.checkpoint,
        module,
        options.strip_prefix,
        outputs,
        functools.partial(source.rename, module=module),
        new_head=options.new_head,
        teaches=isinstance(options, TeacherOptions),
        shapes_only=shapes_only,
    )


def _own_shape(options: ModelOptions, source: ModelSource, shape: Shape) -> Shape:
    """Return the shape of the network's own input."""
    if source.takes not in ("any", kind_of(shape)):
        raise ModelError(
            f"'{source.name}' builds networks for {source.takes}, and the data are {kind_of(shape)}"
        )
    if is_text(shape):
        return shape
    channels, side = source.in_channels(shape[0]), options.input_size
    return (channels, side, side) if side else (channels, *shape[1:])


def _adapter(
    options: ModelOptions,
    source: ModelSource,
    module: nn.Module,
    sees: Shape,
    own: Shape,
    seen: Seen | None,
) -> nn.Module:
    """Build the adapter from batches to the network's input; texts pass unchanged."""
    if not is_text(sees):
        normalization = _normalization(options, source.normalization(module), sees[0], own[0])
        resizing = options.input_size, options.interpolation
        if seen is not None:
            return SeenInput(seen, normalization, *resizing)
        return InputAdapter(normalization, *resizing)
    # otherwise they would be ignored without a word
    if options.normalize or options.input_size:
        raise ModelError("normalize and input_size are for images, and the data are texts")
    return nn.Identity()


def _normalization(
    options: ModelOptions, own: Normalize | None, image_channels: int, channels: int
) -> NormalizationAdapter:
    target = options.normalize or own or Normalize(mean=(0.0,), std=(1.0,))
    # only the recipe's numbers are refused: a source's are of colour images, and are averaged
    if options.normalize and {len(target.mean), len(target.std)} - {1, channels}:
        raise ModelError(
            f"normalize has {len(target.mean)} means and {len(target.std)} deviations for"
            f" {channels} channels"
        )
    adapter = NormalizationAdapter(
        0.0, 1.0, _fit(target.mean, channels), _fit(target.std, channels)
    )
    # raises if the channels cannot be adapted
    adapter(torch.empty(1, image_channels, 1, 1, device=adapter.scale.device))
    return adapter


def _fit(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel; their mean for another number of channels."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _without_empty_layers(module: nn.Module) -> None:
    """Put an identity in the place of a linear layer without outputs, the head of a network for 0
    classes: the network then answers with what the head would get.
    """
    empty = [
        name
        for name, part in module.named_modules()
        if name and isinstance(part, nn.Linear) and part.out_features == 0
    ]
    for name in empty:
        module.set_submodule(name, NoHead())


def _absent(module: nn.Module) -> tuple[str, ...]:
    """List the layers that a network without a head does nothing in, as timm puts an identity in
    the place of a classifier: what a file has for them belongs to a head.
    """
    return tuple(
        name for name, part in module.named_modules() if name and isinstance(part, nn.Identity)
    )


def _head(module: nn.Module, outputs: int | None) -> str:
    """Find the path of the classifier that a checkpoint's would replace.

    Raises:
        ModelError: there is no single one.
    """
    try:
        return classifier_path(module, outputs)
    except TapError:
        raise ModelError(
            "new_head: this network has no single linear classifier, so none can be left out of its"
            " checkpoint"
        ) from None
