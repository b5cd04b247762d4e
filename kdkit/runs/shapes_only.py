"""Networks on the meta device, in less time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, the commonest operations on the meta device take next to no time.

    Torch finds the shapes of their results by Python code of many operations more. A check of a
    deep network would spend half of its time there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = KNOWN.get(func)
        if known is not None and args[0].is_meta:
            return known(*args)
        return func(*args, **(kwargs or {}))


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _itself(x: Tensor, *_: Any) -> Tensor:
    return x


def _batch_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x, [x.shape[1]])


def _batch_norm_in_eval_mode(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x, [0])


def _layer_norm(x: Tensor, shape: Sequence[int], *others: Any) -> Any:
    if (*x.shape[-len(shape) :],) != tuple(shape):
        return aten.native_layer_norm(x, shape, *others)  # refuses it
    normalized = torch.empty_like(x, memory_format=torch.contiguous_format)
    return normalized, *_statistics(x, [*x.shape[: -len(shape)], *[1] * len(shape)])


def _statistics(x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and deviation, which the backward needs."""
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


KNOWN: dict[Any, Callable[..., Any]] = {
    aten.relu.default: _like,
    aten.normal_.default: _itself,
    aten.uniform_.default: _itself,
    aten.clamp_.default: _itself,
    aten.native_batch_norm.default: _batch_norm,
    # what a counter of operations makes of it
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_in_eval_mode,
    aten.native_layer_norm.default: _layer_norm,
}
"""What operations give whose first argument is on the meta device."""
