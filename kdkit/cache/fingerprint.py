"""The dependencies of a teacher's cached answers, as plain values and as one fingerprint."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdkit.cache.packing import KeptAnswers, Slots
from kdkit.contracts.dataset_source import InMemory, Pairs, Texts
from kdkit.contracts.survey import Survey
from kdkit.files import file_digest
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe, content_of
from kdkit.recipe.dependencies import code_digest

FORMAT = 2  # version of the store's files and of this key
LOOKED_AT = 64  # number of images to digest if they are read one by one


def key(
    recipe: Recipe,
    name: str,
    teacher: TappedModel,
    kept: KeptAnswers,
    slots: Slots,
    part: Pairs | InMemory | Texts,
    other: Pairs | InMemory | Texts | None = None,
) -> dict[str, Any]:
    """Collect all that the answers depend on: not the subset, the batch size or the student.

    Args:
        recipe: of the run.
        name: of the teacher.
        teacher: the model in the form that answers.
        kept: which parts of its answers are cached.
        slots: the views that are cached.
        part: the dataset's training part.
        other: that of the dataset of `data.unlabelled`, if it names one.
    """
    precision = str(teacher.precision or recipe.spec.train.precision).removeprefix("torch.")
    autocast = precision not in ("fp32", "float32")
    return {
        **_teacher(recipe, name, teacher),
        # the set of autocast operations depends on the device
        "precision": [
            precision,
            next(teacher.module.parameters()).device.type if autocast else None,
        ],
        "kept": {
            "columns": [str(column) for column in kept.columns()],
            "channels_last": sorted(kept.channels_last),
        },
        "layers": {layer: str(teacher.layers[layer]) for layer in sorted(teacher.layers)},
        "data": _data(recipe, slots),
        "images": _images_digest(part),
        **({} if other is None else {"unlabelled": _unlabelled(recipe, other)}),
    }


def survey_key(
    recipe: Recipe,
    name: str | None,
    teacher: TappedModel,
    survey: Survey,
    part: Pairs | InMemory | Texts,
    images: Tensor,
) -> dict[str, Any]:
    """Collect all that a survey of a teacher's answers depends on.

    Args:
        recipe: of the run.
        name: of the teacher in the recipe (None: a schedule made it).
        teacher: the model in the form that answers.
        survey: what is asked.
        part: the dataset's training part.
        images: places of the images in it that are shown.
    """
    spec = recipe.spec.data
    return {
        **_teacher(recipe, name, teacher),
        "precision": str(teacher.precision),
        "layers": {layer: str(teacher.layers.get(layer, layer)) for layer in survey.layers},
        "function": [survey.name, code_digest(Path(inspect.getfile(survey.reduce)))],
        "arguments": {key: _plain(value) for key, value in survey.arguments.items()},
        "data": {
            "dataset": content_of(spec.dataset),
            "image_size": spec.image_size,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
        },
        "images": [_images_digest(part), _plain(images)],
    }


def _teacher(recipe: Recipe, name: str | None, teacher: TappedModel) -> dict[str, Any]:
    """Collect what the answers of a network depend on, whatever is kept of them."""
    options = {} if name is None else content_of(recipe.spec.all_teachers()[name])
    adapter = vars(teacher.adapt)
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "teacher": {
            **{k: value for k, value in options.items() if k not in ("cache", "name")},
            # of the network as it answers, folded for example, not of a file
            "weights": weights_digest(teacher.module),
        },
        "network": _network_digest(teacher.module),
        "adapter": [
            _network_digest(teacher.adapt),
            weights_digest(teacher.adapt),
            adapter.get("size"),
            adapter.get("interpolation"),
        ],
        "channels_last": teacher.channels_last,
    }


def _plain(value: Any) -> Any:
    """Return a digest of a tensor; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return [str(value.dtype), tuple(value.shape), hashlib.sha256(numbers).hexdigest()]


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the key."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names and types."""
    digest = hashlib.sha256()
    # state_dict leaves some buffers out
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _network_digest(module: nn.Module) -> str:
    """Digest the network's structure: modules, their `extra_repr`, the files of their classes."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        kind = type(part)
        digest.update(
            f"{path} {kind.__qualname__} {part.extra_repr()} {part.training}"
            f" {_source_digest(kind.__module__, _file(kind))}\n".encode()
        )
    return digest.hexdigest()


def _file(kind: type[nn.Module]) -> str:
    """Return the file that defines a class; empty for torch's own, whose version is in the key."""
    try:
        return "" if kind.__module__.startswith("torch.") else inspect.getfile(kind)
    # built in, or defined in an interactive session
    except (OSError, TypeError):
        return ""


@functools.cache
def _source_digest(module: str, file: str) -> str:
    path = Path(file)
    if not path.is_file():
        return module
    return file_digest(path) if "site-packages" in path.parts else code_digest(path)


def _data(recipe: Recipe, slots: Slots) -> dict[str, Any]:
    """Collect everything that the pixels of an image depend on."""
    spec = recipe.spec.data
    values = {
        "dataset": content_of(spec.dataset),
        "image_size": spec.image_size,
        "interpolation": spec.interpolation,
        "slots": slots.count,
    }
    if slots.mixed:  # the whole batch, and the share of a process, decide what is mixed
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return {
            "batches": content_of(spec),
            "slots": slots.count,
            "mixup": content_of(recipe.spec.train.mixup),
            "seed": slots.seed,
            "processes": processes,
            "versions": [version(p) for p in ("numpy", "timm", "torchvision")],
        }
    if slots.exact:  # the seed decides which outcome is drawn, not what it looks like
        return {
            **values,
            "padding": slots.padding,
            "flipped": [slots.outcome(slot) % 2 for slot in range(min(2, slots.count))],
        }
    augment = {"augment": content_of(spec.augment), "timm_augment": content_of(spec.timm_augment)}
    if spec.joint_augment:
        augment["joint_augment"] = content_of(spec.joint_augment)
    # both libraries make the pixels, and may do so differently in another version
    by_libraries = spec.timm_augment or spec.joint_augment
    versions = [version(package) for package in ("timm", "torchvision")] if by_libraries else []
    return {**values, **augment, "versions": versions, "seed": slots.seed}


def _unlabelled(recipe: Recipe, part: Pairs | InMemory | Texts) -> list[Any]:
    """Identify the images of `data.unlabelled`, whose answers come after those of the others."""
    spec = recipe.spec.data.unlabelled
    return [content_of(spec.dataset) if spec else None, _images_digest(part)]


def _images_digest(part: Pairs | InMemory | Texts) -> str:
    """Digest labels and images: all in memory, or a sample of those that are read."""
    # a part whose targets are read with the images may have none
    labels = np.asarray(getattr(part, "labels", ()), dtype=np.int64)
    digest = hashlib.sha256(labels.tobytes())
    for path in getattr(part, "paths", ()):  # of image files
        about = Path(path).stat()
        digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
    if isinstance(part, InMemory):
        digest.update(str(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().flatten().numpy().data)
        return digest.hexdigest()
    if isinstance(part, Texts):
        digest.update(json.dumps([part.tokens, part.padding], sort_keys=True).encode())
        return digest.hexdigest()
    for index in sorted({round(number) for number in np.linspace(0, len(part) - 1, LOOKED_AT)}):
        pixels = np.asarray(part[index][0].convert("RGB"))
        digest.update(str(pixels.shape).encode() + pixels.tobytes())
    return digest.hexdigest()
