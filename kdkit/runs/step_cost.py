"""The cost of a training step, counted by running it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Moment, Stage
from kdkit.models.tapped import TappedModel


@dataclass(frozen=True)
class StepCost:
    """Cost per image of a batch, as multiples of one complete forward pass of the model.

    Attributes:
        forwards, backwards: of students, all together.
        teachers: forwards of models that do not learn: the recipe's teachers, frozen students,
            averages.
    """

    forwards: float
    backwards: float
    teachers: float

    def __str__(self) -> str:
        taught = f", {self.teachers:.3g} of models that teach" if self.teachers else ""
        return (
            f"{self.forwards:.3g} student forwards and {self.backwards:.3g} backwards an"
            f" image{taught}"
        )


def step_cost(
    stage: Stage,
    models: Iterable[TappedModel],
    batch: Callable[[int], Batch],
    images: int,
    moment: Moment,
) -> StepCost:
    """Count a step's passes by the floating-point operations that they take.

    Args:
        stage: the stage whose step is counted; the state of its `parts` is restored.
        models: all models that may run in addition to the stage's students.
        batch: makes a batch of a given number of images, on the models' device.
        images: an even number of images. The step is run with these and with half of them, so that
            what it does once a batch does not count.
        moment: progress of the stage. Some schedules do not use their teachers at the start of a
            stage.
    """
    students = {id(student.module) for student in stage.students}
    others = [model for model in (*models, *stage.buffers) if isinstance(model, TappedModel)]
    # By the network: a student and its view or twin are one model.
    known = {
        id(model.module): model
        for model in (*others, *stage.students)
        if isinstance(model, TappedModel)
    }
    few, many = (
        _passes(stage, [model.module for model in known.values()], batch(count), moment)
        for count in (images // 2, images)
    )
    forwards = backwards = teachers = 0.0
    for key, model in known.items():
        # Of all images less those of half: work that is done once a batch cancels out.
        more = [many[key, learns] - few[key, learns] for learns in (False, True)]
        if not any(more):
            continue
        # The unit: a complete forward, also of a teacher that stops after its deepest tap.
        whole = _whole(model, batch(images // 2))
        if key in students:
            forwards, backwards = forwards + sum(more) / whole, backwards + more[True] / whole
        else:
            teachers += sum(more) / whole
    return StepCost(forwards, backwards, teachers)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations inside the block by torch's formulas.

    Torch's own counter also keeps a sum for each module, which takes time and nobody reads here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


def _passes(
    stage: Stage, networks: Iterable[nn.Module], batch: Batch, moment: Moment
) -> Counter[tuple[int, bool]]:
    """Count the operations in each network's forwards, separately by whether a backward follows."""
    spent: Counter[tuple[int, bool]] = Counter()
    began: dict[int, int] = {}
    # the counted step may update the schedule's own buffers
    remembered = copy.deepcopy(stage.parts.state_dict()) if stage.parts is not None else {}
    with torch.enable_grad(), _Operations() as counter:

        def starts(part: nn.Module, args: object) -> None:
            began[id(part)] = counter.total

        def ends(part: nn.Module, args: object, output: object) -> None:
            learns = any(
                isinstance(value, Tensor) and value.requires_grad for value in _values(output)
            )
            # A forward that runs inside another one counts for both networks.
            spent[id(part), learns] += counter.total - began[id(part)]

        handles = [network.register_forward_pre_hook(starts) for network in networks]
        # a teacher may stop after its deepest tap
        handles += [network.register_forward_hook(ends, always_call=True) for network in networks]
        try:
            stage.step(batch, moment)
        finally:
            for handle in handles:
                handle.remove()
    if stage.parts is not None:
        stage.parts.load_state_dict(remembered)
    return spent


def _values(output: object) -> Iterable[object]:
    return output.values() if isinstance(output, dict) else [output]


def _whole(model: TappedModel, batch: Batch) -> float:
    """Count the operations of one complete forward with a batch."""
    with torch.no_grad(), _Operations() as counter:
        model.twin()(batch.inputs)
    # A network without counted operations must not divide by 0.
    return max(1.0, float(counter.total))
