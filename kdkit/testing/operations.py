"""Records the tensor operations of a loss: how many there are, which widen or draw random numbers,
on which device they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kdkit.contracts.loss import Loss
from kdkit.contracts.records import Batch, Outputs

# fake tensors have only shapes, so the device is not needed
ELSEWHERE = torch.device("cuda:0")
DRAWN = {
    "rand": 0.5,
    "rand_like": 0.5,
    "uniform_": 0.5,
    "randn": 0.5,
    "randn_like": 0.5,
    "normal_": 0.5,
    "normal": 0.5,
    "bernoulli": 1.0,
    "bernoulli_": 1.0,
    "randint": 0.0,
    "randint_like": 0.0,
    "random_": 0.0,
    "exponential_": 1.0,
}
DRAWN_BY_PLACE = {"randperm", "multinomial"}


def _tensors(found: Any) -> Iterable[Tensor]:
    return (x for x in tree_iter(found) if isinstance(x, Tensor))


def _name(operation: Any) -> str:
    return str(operation.overloadpacket.__name__)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations inside the `with` block, and notes those that make doubles of floats, and
    those that draw random numbers.

    Attributes:
        count: of operations.
        widening: names of those that return doubles (0-dimensional ones aside), although none of
            their inputs is double.
        drawing: names of those that draw at random.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.widening: set[str] = set()
        self.drawing: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = operation(*args, **(kwargs or {}))
        self.count += 1
        if _name(operation) in DRAWN.keys() | DRAWN_BY_PLACE:
            self.drawing.add(_name(operation))
        wide = any(x.dtype == torch.float64 for x in _tensors((args, kwargs)))
        if not wide and any(x.dtype == torch.float64 and x.ndim for x in _tensors(given)):
            self.widening.add(_name(operation))
        return given


class ConstantDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the `with` block, equal numbers are drawn for all samples."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = operation(*args, **(kwargs or {}))
        return given.fill_(DRAWN[_name(operation)]) if _name(operation) in DRAWN else given


def run_elsewhere(
    loss: Loss, student: Outputs, teacher: Outputs, batch: Batch, network: nn.Module
) -> str | None:
    """Run forward as if all tensors were on an accelerator; none is needed.

    All arguments stay as they are; `network` is the student's, whose layers the loss may read.

    Returns:
        Why there is no result, or None.

    Raises:
        RuntimeError: tensors of several devices are mixed.
    """
    # copied together: the loss may hold a layer of the network
    loss, network = copy.deepcopy((loss, network))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def there(x: Tensor) -> Tensor:
        return FakeTensor(mode, x.detach().to("meta"), ELSEWHERE)

    for module in [*loss.modules(), *network.modules()]:
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else there(buffer)
        for name, weight in module._parameters.items():
            module._parameters[name] = (
                weight if weight is None else nn.Parameter(there(weight), requires_grad=False)
            )
    with mode, torch.no_grad():
        given = student.map(there), teacher.map(there), batch.map(there)
        try:
            value = loss(*given)
        except Exception as error:
            if "devices" in str(error) or "on device" in str(error) or "device type" in str(error):
                raise RuntimeError(" ".join(str(error).split())) from None
            return type(error).__name__
    if value.device != ELSEWHERE:
        raise RuntimeError(f"the value is on {value.device.type}, the inputs are not")
    return None
