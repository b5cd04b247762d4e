"""The ways in which several processes train one stage: the same students together, or students of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
    gather_object,
    send_to_device,
)
from torch import Tensor, nn

from kdkit.contracts.records import Outputs
from kdkit.contracts.schedule import Stage
from kdkit.data.loaders import EvalLoader
from kdkit.errors import RunError

T = TypeVar("T")


class Together:
    """All processes train the same students, each on its share of every batch: gradients are
    averaged, buffers are copied from the first process, and each measures its share of the data.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def groups(self) -> int:
        """Number of sets of students."""
        return 1

    @property
    def group(self) -> int:
        """Index of this process's set of students."""
        return 0

    @property
    def measure_together(self) -> int:
        """Number of processes that measure one set of students."""
        return int(self.accelerator.num_processes)

    @property
    def writes(self) -> bool:
        """True if this process writes the weights of its students."""
        return bool(self.accelerator.is_main_process)

    def prepared(self, learner: nn.Module, leaves_unused: Callable[[], bool]) -> nn.Module:
        """Wrap the learner for its forward calls; `leaves_unused` says whether some parameters may
        get no gradient.
        """
        if self.accelerator.num_processes > 1:
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(
                find_unused_parameters=leaves_unused()
            )
        return cast("nn.Module", self.accelerator.prepare_model(learner))

    def synchronise(self, modules: Iterable[nn.Module]) -> None:
        """Copy the first process's buffers, which are the ones saved, to every process: each has
        seen a different share of the batches.
        """
        if self.accelerator.num_processes > 1:
            for module in modules:
                broadcast(list(module.buffers()))

    def measured(self, batches: EvalLoader) -> EvalLoader:
        """Return the batches that this process measures its students on."""
        return batches

    def everyones(self, own: list[T]) -> list[T]:
        """Collect one value for each set of students, from all processes that have one."""
        return own

    @property
    def everyones_answers(self) -> Callable[[list[Outputs]], list[Outputs]] | None:
        """Add the answers of other processes' students to those of this one's."""
        return None

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the part of this process's state that a checkpoint stores."""
        return state

    def own_part(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Extract this process's state from a checkpoint.

        Raises:
            RunError: it was saved by a different number of processes.
        """
        parts = saved.get("processes", [saved])
        if len(parts) != self.groups:
            raise RunError(
                f"was begun by {len(parts)} process(es), each with students of its own, and goes on"
                f" with as many, not with {self.accelerator.num_processes}"
            )
        return cast("dict[str, Any]", parts[self.group])


class Apart(Together):
    """Each process trains students of its own on its share of every batch, and measures them on
    the whole data.
    """

    @property
    def groups(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def group(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def measure_together(self) -> int:
        return 1

    @property
    def writes(self) -> bool:
        return True

    def prepared(self, learner: nn.Module, leaves_unused: Callable[[], bool]) -> nn.Module:
        # `evaluation_mode`: mixed precision without DDP, as each process has its own parameters
        return cast("nn.Module", self.accelerator.prepare_model(learner, evaluation_mode=True))

    def synchronise(self, modules: Iterable[nn.Module]) -> None:
        return

    def measured(self, batches: EvalLoader) -> EvalLoader:
        return batches.whole()

    def everyones(self, own: list[T]) -> list[T]:
        return cast("list[T]", gather_object(own))

    @property
    def everyones_answers(self) -> Callable[[list[Outputs]], list[Outputs]] | None:
        return self._gathered

    def _gathered(self, own: list[Outputs]) -> list[Outputs]:
        device = own[0].logits.device
        said = gather_object([answer.map(Tensor.cpu) for answer in own])
        return [answer.map(lambda value: value.to(device)) for answer in said]

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"processes": gather_object([send_to_device(state, "cpu")])}


def processes_of(stage: Stage, accelerator: Accelerator) -> Together:
    """Choose how this launch's processes train the stage."""
    return (Apart if stage.apart and accelerator.num_processes > 1 else Together)(accelerator)
