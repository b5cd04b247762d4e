"""What a dataset says of its samples, held against what it gives: how many there are, and a
class index for each.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Split, Stream, Texts
from kdkit.errors import DataError, KdkitError, ShapeError

Part = Split | InMemory | Texts | Stream
CALLED = {"train": "training", "test": "test"}


def split(source: DatasetSource, name: Literal["train", "test"], info: DataInfo) -> Part:
    """A part of a dataset, as long as the dataset says; what goes wrong in the plugin is told in
    one line.

    Raises:
        DataError: it cannot be read, or has another number of samples.
    """
    try:
        part = source.split(name)
        count = len(part)
    except KdkitError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"dataset '{source.name}': split('{name}') fails: {reason}") from error
    said = info.num_train if name == "train" else info.num_test
    if count != said:
        raise DataError(
            f"dataset '{source.name}' says that it has {said:,} {CALLED[name]} samples, and gives"
            f" {count:,}"
        )
    return part


class NoLabels:
    """Stands where labels would be, while a recipe is checked for images without labels: whoever
    reads them is told so.
    """

    def __len__(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise ShapeError("reads the labels of training images, and they have none")

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise ShapeError("reads the labels of training images, and they have none")

    def __eq__(self, other: object) -> Any:
        return self.__getattr__("__eq__")

    __getitem__ = __iter__ = __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]


NO_LABELS = cast("Tensor", NoLabels())


def class_indices(labels: Any, classes: int, whose: str) -> Tensor:
    """Labels as int64 (N,).

    Args:
        labels: of each sample.
        classes: K.
        whose: begins the message, such as "dataset 'digits': training labels".

    Raises:
        DataError: they are no class indices below K.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{whose} are no numbers: {' '.join(str(error).split())}") from None
    supported = f"a label is one whole number from 0 to {classes - 1}, the class of a sample"
    if found.ndim != 1:
        raise DataError(
            f"{whose} have the shape {tuple(found.shape)}; {supported}: several tags or numbers of"
            " a sample are not supported"
        )
    if found.is_floating_point() or found.is_complex():
        first = found.flatten()[:3].tolist()
        raise DataError(
            f"{whose} are {found.dtype} ({', '.join(map(str, first))}...); {supported}: regression"
            " is not supported"
        )
    found = found.to(torch.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
        raise DataError(
            f"{whose} go from {int(found.min())} to {int(found.max())}, but there are {classes}"
            " classes"
        )
    return found


def class_index(label: Any) -> int:
    """A single label.

    Raises:
        DataError: it is no whole number.
    """
    try:
        return operator.index(label)
    except TypeError:
        raise DataError(
            f"label {label!r} is no whole number, the class of a sample; nothing else is supported"
        ) from None
