"""Checks of a loss's tensor operations: how many, of which type, on which device."""

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
from kdkit.testing.probes import readable, some_probes
from kdkit.testing.promises import promise

# fake tensors have only shapes, so the device is not needed
ELSEWHERE = torch.device("cuda:0")
# What each operation draws inside `ConstantDraws`: numbers that any sample may get.
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


def _tensors(found: Any) -> Iterable[Tensor]:
    return (x for x in tree_iter(found) if isinstance(x, Tensor))


def _name(operation: Any) -> str:
    return str(operation.overloadpacket.__name__)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations inside the `with` block, and notes those that make doubles of floats.

    Attributes:
        count: of operations.
        widening: names of those that return doubles (0-dimensional ones aside), although none of
            their inputs is double.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.widening: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = operation(*args, **(kwargs or {}))
        self.count += 1
        wide = any(x.dtype == torch.float64 for x in _tensors((args, kwargs)))
        # Python's floats become 0-dimensional doubles, which widen nothing.
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
    # Tensors that forward makes itself are let in as they are: their device is what this is about.
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
            # Torch has no error type of its own for mixed devices.
            if "devices" in str(error) or "on device" in str(error) or "device type" in str(error):
                raise RuntimeError(" ".join(str(error).split())) from None
            return type(error).__name__
    if value.device != ELSEWHERE:
        raise RuntimeError(f"the value is on {value.device.type}, the inputs are not")
    return None


@promise
def check_stays_in_its_type(cls: type[Loss], **options: Any) -> None:
    """Check that forward makes no doubles from floats: doubles are slow on GPUs and unsupported on
    Apple's.
    """
    for p in some_probes(cls, options):
        with Operations() as seen:
            p.value()
        p.require(
            not seen.widening,
            f"forward makes fp64 tensors of fp32 ones (in {', '.join(sorted(seen.widening))})",
        )


@promise
def check_does_not_loop_over_the_batch(cls: type[Loss], **options: Any) -> None:
    """Check that a larger batch takes the same number of operations."""
    p = some_probes(cls, options)[0]
    counts = []
    # Both on copies of one loss, as the first step of a memory may take more operations.
    for batch in (p, p.rows("each sample twice", [*range(6), *range(6)])):
        loss = batch.copy_of_loss()
        with Operations() as seen:
            batch.value(loss)
        counts.append(seen.count)
    says = f"{counts[0]} operations for 6 samples, {counts[1]} for 12: work on all samples at once"
    p.require(counts[1] <= counts[0], says)


@promise
def check_works_on_any_device(cls: type[Loss], **options: Any) -> list[str]:
    """Check that every tensor in forward is on the device of its inputs, or in a parameter or
    buffer that moves there with the loss.
    """
    p = some_probes(cls, options)[0]
    teacher = readable(p.loss, p.teacher)
    try:
        why = run_elsewhere(p.loss, p.student, teacher, p.batch, p.context.student)
    except RuntimeError as error:
        says = (
            "on an accelerator it mixes devices; make constants on the device of an input, or"
            " buffers of them"
        )
        raise AssertionError(f"{cls.name}: on {p.form}: {says}: {error}") from None
    if why is None:
        return []
    return [
        "whether it works on an accelerator: forward asks for values, which shapes alone do not"
        f" have ({why})"
    ]
