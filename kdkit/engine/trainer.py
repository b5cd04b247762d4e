"""The one training loop: answers, lessons, objective, backward, step. It knows no algorithm."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
    gather_object,
    patch_environment,
)
from torch import Tensor, nn

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Stage
from kdkit.data.loaders import TrainLoader
from kdkit.engine.objective import Objective, Value, sum_of
from kdkit.engine.optim import Updater
from kdkit.errors import RunError
from kdkit.models.devices import chosen, trains_on_cpu
from kdkit.models.freezing import freeze_all_but, rest
from kdkit.models.tapped import TappedModel
from kdkit.models.weight_files import adopt_shapes
from kdkit.randomness import reseed
from kdkit.recipe.sections import TrainSpec

State = dict[str, Any]
MOST_EPOCHS = 1 << 20  # view id = epoch + view * 2^20


class Learner(nn.Module):
    """A stage as one module: its students and their objectives inside, so that one wrapper (DDP,
    autocast) sees every parameter, and one forward does all that needs gradients.
    """

    def __init__(self, stage: Stage, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.students = nn.ModuleList(student.module for student in stage.students)
        self.objectives = nn.ModuleList(objectives)
        self.parts = stage.parts if stage.parts is not None else nn.Module()
        self._lessons = stage.step

    def forward(self, batch: Batch, epoch: float) -> tuple[Tensor, list[Value]]:
        values = [
            objective(lesson, batch, epoch)
            for objective, lesson in zip(self.objectives, self._lessons(batch), strict=True)
        ]
        return sum_of((value.total for value in values), like=batch.labels), values


def batches(loader: TrainLoader, stage: Stage, epoch: int, start: int = 0) -> Iterator[Batch]:
    """An epoch's batches as a stage wants them: arranged, and in several views."""
    first, *others = (
        loader.epoch(epoch, start, epoch + view * MOST_EPOCHS, stage.arrange)
        for view in range(stage.views)
    )
    for batch, *more in zip(first, *others, strict=True):
        yield replace(batch, views=tuple(other.inputs for other in more)) if more else batch


class Trainer:
    """Trains one stage. Everything that changes on the way is in `state_dict`.

    Args:
        stage: what is trained.
        objectives: one per lesson, set up: the students' own, then those of any further lessons.
        spec: the recipe's `train` section.
        loader: the training batches.
        accelerator: devices, precision, processes.
        seed: with the stage's name and the step, gives every random number.
        maximize: whether what the learning-rate schedules are told after an epoch is an accuracy,
            not a loss.
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
    ) -> None:
        self.stage = stage
        self.spec = spec
        self.loader = loader
        self.accelerator = accelerator
        self.seed = seed
        self.epochs = stage.epochs or spec.epochs
        self.steps_per_epoch = -(-len(loader) // spec.accumulate)
        self.learner = Learner(stage, objectives).to(accelerator.device)
        self._frozen = [] if stage.train is None else self._freeze(stage.train)
        if stage.lr is not None:
            spec = spec.model_copy(
                update={"optimizer": spec.optimizer.model_copy(update={"lr": stage.lr})}
            )
        self.updaters: list[Updater] = []
        # optimised by the first student's optimizer
        shared = nn.ModuleList([self.learner.parts, *objectives[len(stage.students) :]])
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
        self.averages = [_average(network, spec) for network in self._networks]
        self._scaler = _scaler(accelerator)
        self.apart = stage.apart and accelerator.num_processes > 1
        if accelerator.num_processes > 1 and not self.apart:
            accelerator.ddp_handler = DistributedDataParallelKwargs(
                find_unused_parameters=self._leaves_parameters_unused()
            )
        # which wraps it for mixed precision alone
        self._forward = accelerator.prepare_model(self.learner, evaluation_mode=self.apart)
        self.epoch = 0  # finished epochs
        self.step = 0  # optimizer steps done in the current epoch

    def _freeze(self, wanted: Sequence[str]) -> list[nn.Parameter]:
        learner = self.learner
        pairs = zip(learner.students, learner.objectives, strict=False)
        return [
            p
            for student, objective in pairs
            for p in freeze_all_but(wanted, student, cast("Objective", objective).parts())
        ]

    def _leaves_parameters_unused(self) -> bool:
        """Whether the objective reads only a part of the students: DDP then has to look which,
        at a cost.
        """
        self.learner.eval()
        before = [buffer.clone() for buffer in self.learner.buffers()]
        total, _ = self.learner(next(batches(self.loader, self.stage, 0)), 0.0)
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        for buffer, value in zip(self.learner.buffers(), before, strict=True):
            buffer.copy_(value)  # a loss's memory has seen nothing yet
        return any(gather_object([any(gradient is None for gradient in found)]))

    @property
    def steps(self) -> int:
        """Optimizer steps done in the stage."""
        return self.epoch * self.steps_per_epoch + self.step

    def train_epoch(self) -> Iterator[list[Value]]:
        """Train on what is left of the current epoch; after each optimizer step, give the values
        of its batches' lessons.
        """
        self.learner.train()
        if self.stage.train is not None:
            for network in (*self.learner.students, *self.learner.objectives):
                rest(network)
        coming = batches(
            self.loader, self.stage, self.epoch, start=self.step * self.spec.accumulate
        )
        while group := list(itertools.islice(coming, self.spec.accumulate)):
            values = self.optimize(group)
            self.step += 1
            yield values
        self.stage.after_epoch()
        self.epoch, self.step = self.epoch + 1, 0

    def optimize(self, group: Sequence[Batch]) -> list[Value]:
        """One optimizer step on the mean over the group's samples."""
        accelerator, seen = self.accelerator, sum(len(batch.labels) for batch in group)
        reseed(self.seed, self.stage.name, self.steps, accelerator.process_index)
        values: list[Value] = []
        for position, batch in enumerate(group):
            last = position == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._forward):
                total, answers = self._forward(batch, self.epoch + self.step / self.steps_per_epoch)
                self._backward(total * (len(batch.labels) / seen) if len(group) > 1 else total)
            values += answers
        for updater in self.updaters:
            updater.update(self.steps + 1, self._scaler)
        if self._scaler is not None:
            self._scaler.update()
        for network, average in zip(self._networks, self.averages, strict=True):
            if average is not None:
                _take_in(average, network, self.steps + 1)
        if self.stage.buffers:
            # what goes into frozen copies is the same everywhere, as a checkpoint has it
            self.synchronise()
        self.stage.after_step()
        return values

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))

    def close(self) -> None:
        """Let go of what the accelerator and, in several processes, the parameters' hooks keep:
        the next stage wraps them anew.
        """
        del self._forward
        for student, network in zip(self.stage.students, self.deployed(), strict=True):
            cast("TappedModel", student).settle(network)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.accelerator.free_memory()

    def synchronise(self) -> None:
        """Give every process the first one's buffers, which are what is saved: each has seen its
        own share of the batches.
        """
        if self.accelerator.num_processes > 1 and not self.apart:
            for module in (self.learner, *self.deployed()):
                broadcast(list(module.buffers()))

    def refuse_non_finite(self) -> None:
        """Look at what was learnt.

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
        """The networks that are measured and exported: the averages where there are any."""
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
            "updaters": [updater.state_dict() for updater in self.updaters],
            "averages": [
                None if average is None else average.module.state_dict()
                for average in self.averages
            ],
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        adopt_shapes(self.learner, state["learner"])
        self.learner.load_state_dict(state["learner"])
        for model, saved in zip(self.stage.buffers, state["buffers"], strict=True):
            adopt_shapes(model.module, saved)
            model.module.load_state_dict(saved)
        for updater, saved in zip(self.updaters, state["updaters"], strict=True):
            updater.load_state_dict(saved)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            if average is not None:
                adopt_shapes(average.module, saved)
                average.module.load_state_dict(saved)
        if self._scaler:
            self._scaler.load_state_dict(state["scaler"])


def build_accelerator(spec: TrainSpec, **options: Any) -> Accelerator:
    """One process's view of the devices, in the recipe's precision.

    Raises:
        RunError: the machine has no such device, or fp16 without a GPU.
    """
    try:
        device = chosen(spec.device)
    except RunError as error:
        raise RunError(f"train.device: {error}") from None
    AcceleratorState._reset_state()  # another recipe in this process may have had another precision
    if PartialState._shared_state and PartialState().num_processes == 1:
        PartialState._reset_state()
    cpu = trains_on_cpu(spec)
    if spec.precision == "fp16" and cpu:
        raise RunError("train.precision fp16 needs a GPU; on the CPU use fp32 (or bf16)")
    precision = "no" if spec.precision == "fp32" else spec.precision
    which = (
        {"ACCELERATE_TORCH_DEVICE": str(device)}
        if device is not None and device.index is not None
        else {}
    )
    with patch_environment(**which):
        return Accelerator(
            mixed_precision=precision, cpu=cpu, step_scheduler_with_optimizer=False, **options
        )


def _average(student: nn.Module, spec: TrainSpec) -> Any:
    from timm.utils import ModelEmaV3

    return (
        ModelEmaV3(student, decay=spec.ema.decay, use_warmup=spec.ema.warmup) if spec.ema else None
    )


def _take_in(average: Any, network: nn.Module, steps: int) -> None:
    """Move the average towards a network that has done so many steps."""
    try:
        average.update(network, step=steps)
    except RuntimeError:
        theirs = average.module.state_dict()
        changed = [
            name
            for name, value in network.state_dict().items()
            if name not in theirs or theirs[name].shape != value.shape
        ]
        if not changed:
            raise
        says = f"step {steps}: the student's '{changed[0]}' has another shape than at the start"
        raise RunError(f"{says}, so that `train.ema` has no mean to take; leave it out") from None


def _scaler(accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """A scaler of the stage's own, as its scale follows the stage's gradients: the accelerator
    may serve other runs too.
    """
    return (
        torch.amp.GradScaler(accelerator.device.type)
        if accelerator.mixed_precision == "fp16"
        else None
    )
