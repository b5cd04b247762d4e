"""timm's optimizer and learning-rate schedule, with a separate parameter group for the losses'
adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdkit.errors import RunError, suggest
from kdkit.recipe.sections import LrScheduleSpec, TrainSpec

FLAGS = ("fused", "capturable")  # of torch's optimizers: few kernels, which can be recorded


class Updater:
    """Updates one student and the learnable parts of its losses: an optimizer, its learning-rate
    schedule, clipping.

    Args:
        spec: the recipe's `train` section.
        student: the network that learns.
        adapters: holds every learnable part of its losses.
        taken: parameters that another student's optimizer changes already.
        epochs, steps_per_epoch, maximize: see `LrSchedule`.
    """

    def __init__(
        self,
        spec: TrainSpec,
        student: nn.Module,
        adapters: nn.Module,
        taken: Collection[nn.Parameter] = (),
        *,
        epochs: int,
        steps_per_epoch: int,
        maximize: bool,
    ) -> None:
        self.optimizer = build_optimizer(spec, student, adapters, taken)
        self.schedule = LrSchedule(spec, self.optimizer, epochs, steps_per_epoch, maximize=maximize)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        _begin_momentum(self.optimizer)
        self._clip = spec.clip_grad
        self.lr = self._next_lr
        """Learning rate of the last step; before the first step, that of the first."""

    @property
    def _next_lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def capturable(self) -> bool:
        """True if its steps can be recorded: they read the learning rate from a tensor."""
        groups = self.optimizer.param_groups
        return all(group.get("fused") or group.get("capturable") for group in groups)

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group of parameters in the next step."""
        # rounded as in the tensor that a recorded step reads, so that both do the same arithmetic
        scheduled = self._scheduled
        return [float(np.float32(rate)) for rate in scheduled] if self.capturable else scheduled

    @property
    def _scheduled(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def update(self, rates: Sequence[Any], scaler: Any = None) -> None:
        """Clip, step, clear the gradients.

        Accelerate's wrappers do the same, but search the disk for packages at each step.

        Args:
            rates: learning rate of each group; tensors in a step that is recorded.
            scaler: of the gradients, in fp16.
        """
        scheduled = self._scheduled
        self._set(rates)
        try:
            self._update(scaler)
        finally:
            # schedules compute with plain numbers
            self._set(scheduled)

    def _update(self, scaler: Any) -> None:
        if self._clip:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self._clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)  # skips the step if the scaled gradients overflowed
        self.optimizer.zero_grad(set_to_none=True)

    def advance(self, steps: int) -> None:
        """Set the rate for the step that follows `steps` steps."""
        self.lr = self._next_lr
        self.schedule.after_step(steps)

    def _set(self, rates: Sequence[Any]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # how the step is computed belongs to this device, not to the one that wrote the state
        flags = [{key: group.get(key) for key in FLAGS} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, flags, strict=True):
            group.update({key: value for key, value in own.items() if key in group})
        self.schedule.load_state_dict(state["schedule"])
        self.lr = state.get("lr", self._next_lr)  # checkpoints of earlier versions have none


def build_optimizer(
    spec: TrainSpec, student: nn.Module, adapters: nn.Module, taken: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over a student and the learnable parts of its losses.

    Args:
        spec: the recipe's `train` section.
        student: the network that learns; layer decay and decay-free parameters as timm does them.
        adapters: holds every learnable part of the losses.
        taken: parameters to leave out.

    Raises:
        RunError: timm has no such optimizer, or the optimizer does not accept its arguments.
    """
    import timm.optim

    want = spec.optimizer
    groups = (
        _groups(student, spec, want.weight_decay)
        if any(p.requires_grad for p in student.parameters())
        else []
    )
    if any(True for _ in adapters.parameters()):
        decay = (
            want.weight_decay if spec.adapters.weight_decay is None else spec.adapters.weight_decay
        )
        own = {"lr": spec.adapters.lr} if spec.adapters.lr else {}
        groups += [{**group, **own} for group in _groups(adapters, spec, decay, layers=False)]
    left_out = {id(p) for p in taken}
    groups = [
        {**group, "params": [p for p in group["params"] if id(p) not in left_out]}
        for group in groups
    ]
    groups = [group for group in groups if group["params"]]
    names = [str(name) for name in timm.optim.list_optimizers()]
    if want.name not in names:
        raise RunError(f"timm has no optimizer '{want.name}'; {suggest(want.name, names)}")
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups,
            want.name,
            lr=want.lr,
            weight_decay=want.weight_decay,
            momentum=want.momentum,
            **{**_for_device(want.name, groups, want.args), **want.args},
        )
    except Exception as error:  # each optimizer raises its own errors
        raise RunError(
            f"optimizer '{want.name}' cannot be made: {' '.join(str(error).split())}"
        ) from None
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin with a momentum of zero. Fused SGD takes it from the first gradient, and leaves it
    uninitialised where fp16 skips the first step.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _for_device(
    name: str, groups: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
) -> dict[str, bool]:
    """Return the arguments by which torch's optimizers do their step in few kernels on a GPU, and
    can be recorded.
    """
    import timm.optim

    # torch refuses them together
    if asked.get("foreach") or asked.get("differentiable"):
        return {}
    if not all(p.device.type == "cuda" for group in groups for p in group["params"]):
        return {}
    optimizer = timm.optim.get_optimizer_class(name, bind_defaults=False)
    taken = inspect.signature(optimizer).parameters
    is_torchs = optimizer.__module__.startswith("torch.")
    return {key: True for key in FLAGS if is_torchs and key in taken}


def _groups(
    module: nn.Module, spec: TrainSpec, weight_decay: float, *, layers: bool = True
) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
    if layers and spec.optimizer.layer_decay:
        found = param_groups_layer_decay(
            module,
            weight_decay,
            no_weight_decay_list=exempt(),
            layer_decay=spec.optimizer.layer_decay,
        )
    elif spec.optimizer.decay_norm_and_bias:
        found = [
            {
                "params": [p for p in module.parameters() if p.requires_grad],
                "weight_decay": weight_decay,
            }
        ]
    else:
        found = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=exempt())
    return [group for group in found if group["params"]]


class LrSchedule:
    """timm's schedule, advanced after every optimizer step; plateau after every epoch.

    The rate is a function of the step, so only plateau needs saved state to resume.
    """

    def __init__(
        self,
        spec: TrainSpec,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        steps_per_epoch: int,
        *,
        maximize: bool,
    ) -> None:
        want = spec.lr_schedule.within(epochs)
        self.by_epoch = want.name == "plateau"
        self._scheduler = _scheduler(
            want, optimizer, max(1, epochs - want.cooldown_epochs), steps_per_epoch
        )
        self._plateau = _plateau(want, optimizer, maximize) if self.by_epoch else None
        self._warmup = want.warmup_epochs
        self._per_epoch = steps_per_epoch
        self._min_lr = want.min_lr
        self._cooldown = (
            (epochs - want.cooldown_epochs) * steps_per_epoch if want.cooldown_epochs else None
        )
        self.after_step(0)

    def after_step(self, steps: int) -> None:
        """Set the rate for the step that follows `steps` steps."""
        if self._cooldown is not None and steps >= self._cooldown:
            # timm's step schedules do not go to `min_lr` by themselves
            self._scheduler.update_groups(self._min_lr)
        elif not self.by_epoch or steps <= self._warmup * self._per_epoch:
            self._scheduler.step_update(steps)

    def after_epoch(self, epochs: int, metric: float) -> None:
        """Pass the epoch's score to plateau."""
        if (
            self._plateau is not None
            and epochs > self._warmup
            and (self._cooldown is None or epochs * self._per_epoch < self._cooldown)
        ):
            self._plateau.step(metric)

    def state_dict(self) -> dict[str, Any]:
        return (
            {}
            if self._plateau is None
            else {
                k: v
                for k, v in self._plateau.state_dict().items()
                if isinstance(v, int | float | list)
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._plateau is not None:
            self._plateau.load_state_dict(state)


def _scheduler(
    want: LrScheduleSpec, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int
) -> Any:
    from timm.scheduler import create_scheduler_v2

    # a step schedule that never steps, for its warm-up
    steady = want.name in ("constant", "plateau")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if steady else want.name,
        num_epochs=epochs,
        decay_rate=1.0 if steady else want.decay_rate,
        decay_epochs=want.step_epochs,
        decay_milestones=list(want.milestones),
        warmup_epochs=want.warmup_epochs,
        warmup_lr=want.warmup_lr,
        min_lr=want.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    if want.name == "multistep":
        # compensates for timm's decay, which comes one step too early
        scheduler.decay_t = [
            milestone * steps_per_epoch + 1 for milestone in sorted(want.milestones)
        ]
    return scheduler


def _plateau(
    want: LrScheduleSpec, optimizer: torch.optim.Optimizer, maximize: bool
) -> ReduceLROnPlateau:
    """Build torch's own plateau scheduler: timm's wrapper around it has no state dict."""
    return ReduceLROnPlateau(
        optimizer,
        "max" if maximize else "min",
        factor=want.decay_rate,
        patience=want.patience,
        min_lr=want.min_lr,
    )
