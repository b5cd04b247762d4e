"""Compares what a dataset declares about its samples with what it returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Pairs, Stream, Texts
from kdkit.contracts.task import Task
from kdkit.errors import DataError, KdkitError, cause

Part = Pairs | InMemory | Texts | Stream
CALLED = {"train": "training", "test": "test"}


def split(source: DatasetSource, name: Literal["train", "test"], info: DataInfo) -> Part:
    """Return a part of a dataset after checking its length; errors in the plugin become one line.

    Raises:
        DataError: it cannot be read, or has another number of samples.
    """
    try:
        part = source.split(name)
        count = len(part)
    except KdkitError:
        raise
    except Exception as error:
        raise DataError(
            f"dataset '{source.name}': split('{name}') fails: {cause(error)}"
        ) from error
    announced = info.num_train if name == "train" else info.num_test
    if count != announced:
        raise DataError(
            f"dataset '{source.name}' says that it has {announced:,} {CALLED[name]} samples, and"
            f" gives {count:,}"
        )
    return part


def labels_of(part: Pairs | InMemory | Texts, task: Task, whose: str) -> Any:
    """Return the labels of a part, as the dataset gives them.

    Raises:
        DataError: it has none.
    """
    labels = getattr(part, "labels", None)
    if labels is None:
        raise DataError(
            f"{whose} are missing: its part has no `labels`, which task '{task.name}' needs; a"
            " dataset for another task says so (`task = ...`), or the recipe does (`task:`)"
        )
    return labels


def as_values(targets: Any) -> Any:
    """Stack targets that come one by one as tensors; return others unchanged."""
    is_rows = isinstance(targets, list | tuple) and len(targets) > 0
    if is_rows and all(isinstance(target, Tensor) for target in targets):
        shapes = {target.shape for target in targets}
        # targets of several shapes cannot be stacked; the task may take them, or refuse them
        return torch.stack([*targets]) if len(shapes) == 1 else targets
    return targets


def described(source: DatasetSource, task: Task) -> DataInfo:
    """Return the properties of a dataset, with the sample shape in the task's terms.

    Raises:
        DataError: its files do not exist, or the task does not take its samples.
    """
    info = source.info()
    task.check(info)
    return replace(task.described(info), image_shape=task.shape(info.image_shape))
