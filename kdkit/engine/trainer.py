"""A stage's trainer: networks, losses, optimizers, averages, and their state. `kdkit.engine.loop`
drives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from kdkit.contracts.balance import Balance, BalanceOptions
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Moment, Stage
from kdkit.data.loaders import TrainLoader
from kdkit.engine.averages import average_of
from kdkit.engine.balancing import Balancing
from kdkit.engine.capture import Captured, Numbers, Plain, Take
from kdkit.engine.graphs import CudaGraphs
from kdkit.engine.objective import Objective, Ramps, Value, sum_of, without_graph
from kdkit.engine.optim import Updater
from kdkit.engine.processes import processes_of
from kdkit.errors import RunError
from kdkit.models.freezing import freeze_all_but
from kdkit.models.tapped import TappedModel
from kdkit.models.weight_files import adopt_shapes
from kdkit.recipe.sections import TrainSpec

State = dict[str, Any]
MOST_EPOCHS = 1 << 20  # view id = epoch + view * 2^20


class Learner(nn.Module):
    """A stage as one module: its students and their objectives inside, so that one wrapper (DDP,
    autocast) sees every parameter, and one forward computes everything that needs gradients.
    """

    def __init__(self, stage: Stage, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.students = nn.ModuleList(student.module for student in stage.students)
        self.objectives = nn.ModuleList(objectives)
        self.parts = stage.parts if stage.parts is not None else nn.Module()
        self._lessons = stage.step
        self.balancing: Balancing | None = None

    def forward(
        self, batch: Batch, moment: Moment, ramps: Sequence[Ramps]
    ) -> tuple[Tensor, list[Value]]:
        # who teaches whom must not depend on labels that only some samples have
        lessons = self._lessons(batch.without_labels(), moment)
        values = [
            objective(lesson, batch, now)
            for objective, lesson, now in zip(self.objectives, lessons, ramps, strict=True)
        ]
        total = sum_of((value.total for value in values), like=batch.labels)
        return total, values if self.balancing else [without_graph(value) for value in values]


def batches(loader: TrainLoader, stage: Stage, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Return an epoch's batches in the form that a stage requires: arranged, and in several
    views.
    """
    first, *others = (
        loader.epoch(epoch, start, epoch + view * MOST_EPOCHS, stage.data.arrange)
        for view in range(stage.data.views)
    )
    for batch, *more in zip(first, *others, strict=True):
        yield replace(batch, views=tuple(other.inputs for other in more)) if more else batch


class Trainer:
    """Trains one stage. All state that changes during training is in `state_dict`.

    Args:
        stage: the stage to train.
        objectives: one per lesson, set up: the students' own, then those of any further lessons.
        spec: the recipe's `train` section.
        loader: the training batches.
        accelerator: devices, precision, processes.
        seed: determines every random number, together with the stage's name and the step.
        maximize: whether the value passed to the learning-rate schedules after an epoch is an
            accuracy, not a loss.
        balance: combines the gradients of the losses (None: they are added up).
    """

    def __init__(
        self,
        stage: Stage,
        objectives: Sequence[Objective],
        spec: TrainSpec,
        loader: TrainLoader,
        accelerator: Accelerator,
        *,
        seed: int,
        maximize: bool,
        balance: tuple[type[Balance], BalanceOptions] | None = None,
    ) -> None:
        self.stage = stage
        self.spec = spec
        self.loader = loader
        self.accelerator = accelerator
        self.seed = seed
        self.epochs = stage.training.epochs or spec.epochs
        self.steps_per_epoch = -(-len(loader) // spec.accumulate)
        self.learner = Learner(stage, objectives).to(accelerator.device)
        self._frozen = [] if stage.training.train is None else self._freeze(stage.training.train)
        if stage.training.lr is not None:
            spec = spec.model_copy(
                update={"optimizer": spec.optimizer.model_copy(update={"lr": stage.training.lr})}
            )
        self.updaters: list[Updater] = []
        # optimised by the first student's optimizer
        shared = nn.ModuleList([self.learner.parts, *objectives[len(stage.students) :]])
        # not strict: further objectives belong to lessons without a student of their own
        for student, objective in zip(self.learner.students, self.learner.objectives, strict=False):
            adapters = objective if self.updaters else nn.ModuleList([objective, shared])
            taken = [p for updater in self.updaters for p in updater.parameters]
            lengths = {"epochs": self.epochs, "steps_per_epoch": self.steps_per_epoch}
            self.updaters.append(
                Updater(spec, student, adapters, taken, **lengths, maximize=maximize)
            )
        self._networks = [
            objective.deploy(student.module)
            for student, objective in zip(stage.students, objectives, strict=False)
        ]
        self.averages = [average_of(network, spec) for network in self._networks]
        self.scaler = _scaler(accelerator)
        self.processes = processes_of(stage, accelerator)
        if balance is not None:
            self.learner.balancing = self._balancing(*balance)
        self._forward = self.processes.prepared(self.learner, self._leaves_parameters_unused)
        self.take: Take = Plain()
        self.epoch = 0  # finished epochs
        self.step = 0  # optimizer steps done in the current epoch

    def _balancing(self, kind: type[Balance], options: BalanceOptions) -> Balancing:
        parameters = []
        for student, updater in zip(self.learner.students, self.updaters, strict=True):
            own = {id(p) for p in student.parameters()}
            ours = [p for p in updater.parameters if id(p) in own]
            parameters.append((ours, [p for p in updater.parameters if id(p) not in own]))
        objectives = [cast("Objective", each) for each in self.learner.objectives]
        apart = self.processes.groups > 1
        made = Balancing(kind, options, objectives, parameters, None if apart else self.accelerator)
        return made.to(self.accelerator.device)

    def _freeze(self, wanted: Sequence[str]) -> list[nn.Parameter]:
        learner = self.learner
        pairs = zip(learner.students, learner.objectives, strict=False)
        return [
            p
            for student, objective in pairs
            for p in freeze_all_but(wanted, student, cast("Objective", objective).parts())
        ]

    def _leaves_parameters_unused(self) -> bool:
        """Check whether the objective reads only a part of the students: DDP then has to search for
        unused parameters, at a cost.
        """
        self.learner.eval()
        # the forward below changes buffers, such as memory banks of losses
        before = [buffer.clone() for buffer in self.learner.buffers()]
        probe = next(batches(self.loader, self.stage, 0))
        total, _ = self.learner(probe, Moment(0, 0), self._ramps(0.0))
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        for buffer, value in zip(self.learner.buffers(), before, strict=True):
            buffer.copy_(value)  # the probe must leave no trace in a loss's memory
        return any(gather_object([any(gradient is None for gradient in found)]))

    @property
    def steps(self) -> int:
        """Number of optimizer steps done in the stage."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def moment(self) -> Moment:
        """The current progress of the stage."""
        return Moment(self.epoch, self.steps)

    @property
    def numbers(self) -> Numbers:
        """The numbers of the next step."""
        # epochs of the stage so far, including the fraction of the current one
        ramps = self._ramps(self.epoch + self.step / self.steps_per_epoch)
        if self.updaters[0].capturable:
            # rounded as in the tensors that a recorded step reads, so that both compute alike
            ramps = [{key: float(np.float32(x)) for key, x in each.items()} for each in ramps]
        return Numbers(
            ramps,
            [updater.rates for updater in self.updaters],
            [None if one is None else one.changing_share(self.steps + 1) for one in self.averages],
        )

    def _ramps(self, progress: float) -> list[Ramps]:
        return [cast("Objective", each).ramps(progress) for each in self.learner.objectives]

    def forward(
        self, batch: Batch, moment: Moment, ramps: Sequence[Ramps]
    ) -> tuple[Tensor, list[Value]]:
        """Compute the total of all losses, with gradient, and the value of each."""
        return cast("tuple[Tensor, list[Value]]", self._forward(batch, moment, ramps))

    def backward(self, total: Tensor, values: list[Value], share: float) -> list[Value]:
        """Add to the gradients those of a batch that is this share of a step; return the values.

        The loss is scaled in fp16, so that small gradients do not vanish.
        """
        if self.learner.balancing is not None:
            return self.learner.balancing.add(values, share)
        loss = total * share if share < 1 else total
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        return values

    def combine(self) -> None:
        """Let a balance make one gradient of those of the losses."""
        if self.learner.balancing is not None:
            self.learner.balancing.combine()

    def averaging(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over the processes inside the block, if it is the last of a step; a
        balance does that itself.
        """
        if last and self.learner.balancing is None:
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(self._forward)
        return found

    def move_averages(self, shares: Sequence[Any]) -> None:
        """Update the moving averages of the weights (`train.ema`) after a step."""
        for network, average, share in zip(self._networks, self.averages, shares, strict=True):
            if average is not None:
                average.take_in(network, self.steps + 1, share)

    def capture(self, wanted: bool | Literal["auto"], say: Callable[[str], None]) -> None:
        """Record the steps from here on (`train.capture`), if the device and the stage allow it.

        Args:
            wanted: by the recipe.
            say: called with the reason why a stage on a CUDA device is not recorded.
        """
        if wanted is False or self.accelerator.device.type != "cuda":
            return
        if (reason := self._not_capturable()) is not None:
            say(f"each step is launched kernel by kernel (train.capture): {reason}")
            return
        self.take = Captured(
            CudaGraphs(), say, has_hooks=self.stage.has_hooks, modules=[self.learner]
        )

    def _not_capturable(self) -> str | None:
        if self.accelerator.num_processes > 1:
            return "several processes train together"
        if self.spec.compile:
            return "train.compile is set"
        for objective in self.learner.objectives:
            for name, loss in cast("Objective", objective).parts().items():
                if not loss.capturable:
                    return f"loss '{name}' says that it cannot be recorded"
        if self.learner.balancing is not None and not self.learner.balancing.capturable:
            return "the balance says that it cannot be recorded"
        for updater in self.updaters:
            if not updater.capturable:
                name = type(updater.optimizer).__name__
                return f"optimizer {name} has no form that can be recorded"
        return None

    def close(self) -> None:
        """Release what the accelerator and, with several processes, the parameters' hooks hold: the
        next stage wraps the networks again.
        """
        # records hold memory of the device
        self.take = Plain()
        # the wrapper holds the networks, and DDP its hooks
        del self._forward
        for student, network in zip(self.stage.students, self.deployed(), strict=True):
            cast("TappedModel", student).settle(network)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.accelerator.free_memory()

    def synchronise(self) -> None:
        """Make the buffers equal in all processes that train the same students."""
        self.processes.synchronise((self.learner, *self.deployed()))

    def refuse_non_finite(self) -> None:
        """Check that all parameters are finite.

        Raises:
            RunError: a parameter is not finite.
        """
        names, values = zip(*self.learner.named_parameters(), strict=True)
        for name, finite in zip(
            names, torch.stack([value.isfinite().all() for value in values]).tolist(), strict=True
        ):
            if not finite:
                raise RunError(
                    f"step {self.steps}: the losses are finite, but after the optimizer's step"
                    f" {name} is not"
                )

    def deployed(self) -> list[nn.Module]:
        """Return the networks that are measured and exported: the averages if there are any."""
        return [
            n if average is None else average.module
            for n, average in zip(self._networks, self.averages, strict=True)
        ]

    def state_dict(self) -> State:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "learner": self.learner.state_dict(),
            "buffers": [model.module.state_dict() for model in self.stage.buffers],
            "keeps": {name: kept.state_dict() for name, kept in self.stage.keeps.items()},
            "updaters": [updater.state_dict() for updater in self.updaters],
            "averages": [
                None if average is None else average.module.state_dict()
                for average in self.averages
            ],
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        adopt_shapes(self.learner, state["learner"])
        self.learner.load_state_dict(state["learner"])
        for model, saved in zip(self.stage.buffers, state["buffers"], strict=True):
            adopt_shapes(model.module, saved)
            model.module.load_state_dict(saved)
        for name, kept in self.stage.keeps.items():
            kept.load_state_dict(state["keeps"][name])
        for updater, saved in zip(self.updaters, state["updaters"], strict=True):
            updater.load_state_dict(saved)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            if average is not None:
                adopt_shapes(average.module, saved)
                average.module.load_state_dict(saved)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


def _scaler(accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """Build a gradient scaler for this stage alone, as its scale follows the stage's gradients: the
    accelerator may serve other runs too.
    """
    return (
        torch.amp.GradScaler(accelerator.device.type)
        if accelerator.mixed_precision == "fp16"
        else None
    )
