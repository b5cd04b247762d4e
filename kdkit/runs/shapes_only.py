"""Networks on the meta device, in less time."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MOST = 20_000  # operations that are remembered
IN_PLACE = {
    aten.normal_.default,
    aten.uniform_.default,
    aten.clamp_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.relu_.default,
}
"""Operations that give their first argument, whatever it is."""

Form = tuple[Sequence[int], Sequence[int], torch.dtype]  # sizes, strides, type


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, an operation on the meta device takes time once: what it gives for
    arguments of the same shapes is remembered.

    Torch finds the shapes of many results by Python code of many operations more. A check of a
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
        kwargs = kwargs or {}
        if func in IN_PLACE and args[0].is_meta:
            return args[0]
        key = _key(func, args, kwargs) if _is_function(func) else None
        if key is not None and (forms := _remembered.get(key)) is not None:
            made = [
                torch.empty_strided(size, stride, dtype=dtype, device=META)
                for size, stride, dtype in forms
            ]
            return made[0] if len(made) == 1 else tuple(made)
        given = func(*args, **kwargs)
        if key is not None:
            _remember(key, given)
        return given


# by operation and arguments: what it gives
_remembered: dict[tuple[Any, ...], list[Form]] = {}


def _remember(key: tuple[Any, ...], given: Any) -> None:
    results = given if isinstance(given, tuple) else (given,)
    if all(type(one) is Tensor and one.is_meta for one in results):
        if len(_remembered) >= MOST:
            _remembered.clear()
        _remembered[key] = [(one.shape, one.stride(), one.dtype) for one in results]


@functools.cache
def _is_function(func: Any) -> bool:
    """Check whether an operation gives new tensors, and changes none."""
    schema = getattr(func, "_schema", None)
    parts = () if schema is None else (*schema.arguments, *schema.returns)
    return bool(parts) and all(part.alias_info is None for part in parts)


def _key(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what the form of a result follows from; None if something is not on the meta device,
    or unknown.
    """
    found: list[Any] = [func, torch.get_default_dtype()]
    on_meta = False
    for value in (*args, *kwargs, *kwargs.values()):
        for one in (len(value), *value) if isinstance(value, (list, tuple)) else (value,):
            if type(one) in (Tensor, nn.Parameter):
                if not one.is_meta:
                    return None
                on_meta = True
                found += one.shape, one.stride(), one.dtype
            elif type(one) in PLAIN:
                found += type(one), one  # 1 is equal to 1.0 and to true
                on_meta = on_meta or one == META
            else:
                return None
    return tuple(found) if on_meta else None


META = torch.device("meta")
PLAIN = {
    bool,
    float,
    int,
    str,
    torch.device,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    type(None),
}
"""Types of the other arguments that are understood."""
