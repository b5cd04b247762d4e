"""What tasks share that ask for several numbers of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kdkit


def columns(info: kdkit.DataInfo) -> tuple[str, ...]:
    """Names of the K numbers of a sample: those of the dataset, else 0 to K - 1."""
    return info.class_names or tuple(map(str, range(info.outputs)))


def table(
    values: Any, info: kdkit.DataInfo, whose: str, wanted: str, within: tuple[float, float]
) -> Tensor:
    """Targets as fp32 (N, K); one number a sample becomes a column.

    Args:
        values: see `Task.targets`.
        info: of the dataset.
        whose: begins a message.
        wanted: what a target is, for messages.
        within: smallest and largest valid number.

    Raises:
        DataError: they are no such numbers; names the first sample that is wrong.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        says = " ".join(str(error).split())
        raise kdkit.DataError(f"{whose} are no table of numbers: {says}") from None
    if found.is_complex():
        raise kdkit.DataError(f"{whose} are complex numbers; {wanted}")
    shape = tuple(found.shape)
    if shape[1:] != (info.outputs,) and (len(shape) != 1 or info.outputs != 1):
        raise kdkit.DataError(f"{whose} have the shape {shape}, not (N, {info.outputs}); {wanted}")
    found = found.to(torch.float32).reshape(-1, info.outputs)
    # `~`: a comparison with NaN is false, so that NaN is wrong too
    wrong = ~((found >= within[0]) & (found <= within[1]))
    if wrong.any():
        sample, column = wrong.nonzero()[0].tolist()
        raise kdkit.DataError(
            f"{whose}: sample {sample} has {found[sample, column]:g} for"
            f" '{columns(info)[column]}'; {wanted}"
        )
    return found
