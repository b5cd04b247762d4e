"""Records and repeats an optimizer step without a GPU, as a CUDA graph would: the same operations
on the same memory, with every plain number as it was when the step was recorded.

A step that leaves other values than the loop itself has frozen something that must not be: a
learning rate, a ramp, a counter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")

DEPENDS_ON_DATA = {
    "aten.bincount.default",
    "aten.masked_select.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.unique_consecutive.default",
    "aten.unique_dim.default",
    "aten._unique2.default",
}
"""Operations whose result has a shape that depends on values: a device must tell the host."""
READS = {"__bool__", "__float__", "__int__", "item", "numpy", "tolist"}
"""Methods of a tensor that bring its values to the host."""


class Replays:
    """A device whose steps can be repeated: the processor, for tests."""

    def recorder(self) -> Tape:
        return Tape()

    @contextlib.contextmanager
    def watching(self, reasons: list[str]) -> Iterator[None]:
        operations = _Operations(reasons.append)
        with operations, _Methods(reasons.append, operations):
            yield

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            yield


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds operations that no recorded step can hold."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refuse = refuse
        self.is_lenient = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        by_mask = str(func).startswith("aten.index") and any(
            isinstance(value, Tensor) and value.dtype == torch.bool
            for value in tree_leaves(args[1:])
        )
        plain = any(isinstance(value, (bool, int, float)) for value in tree_leaves(result))
        if not self.is_lenient and (by_mask or plain or str(func) in DEPENDS_ON_DATA):
            self._refuse(f"the host reads a value of the device by {func}")
        return result


class _Methods(TorchFunctionMode):
    """Finds methods that bring values to the host without an operation."""

    def __init__(self, refuse: Callable[[str], None], operations: _Operations) -> None:
        super().__init__()
        self._refuse = refuse
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self._refuse(f"the host reads a value of the device by {name}")
        # `one_hot` checks its input on a processor only
        self._operations.is_lenient = name == "one_hot"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._operations.is_lenient = False


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations while they run, and runs them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[tuple[Any, Any, Any, Any]] = []

    def record(self, work: Callable[[], T]) -> T:
        with self:
            return work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # aliases, as `squeeze_` changes the shape of a tensor; lists are copied, as their owner may
        # clear them
        held = tree_map(_alias, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self._steps.append((func, *held, tree_map(_alias, result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._steps:
            again = func(*args, **kwargs)
            # views and results in place lie in memory that is written already
            if any(one.alias_info is not None for one in func._schema.returns):
                continue
            for tensor, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(tensor, Tensor):
                    tensor.copy_(value)


def _alias(value: Any) -> Any:
    """Return a tensor of its own for the same memory."""
    return value.detach() if isinstance(value, Tensor) else value
