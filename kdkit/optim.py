"""timm's optimizer and learning-rate schedule, with a group of their own for the losses' adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kdkit.errors import RecipeError, suggest
from kdkit.schema import TrainSpec


def build_optimizer(spec: TrainSpec, students: Sequence[nn.Module], adapters: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the students and the losses' learnable parts.

    Args:
        spec: the recipe's `train` section.
        students: networks that learn; layer decay and decay-free parameters as timm does them.
        adapters: holds every learnable part of the losses.

    Raises:
        RecipeError: timm has no such optimizer, or it does not take such arguments.
    """
    import timm.optim

    want = spec.optimizer
    groups = [group for student in students for group in _groups(student, spec, want.weight_decay)]
    if any(True for _ in adapters.parameters()):
        decay = want.weight_decay if spec.adapters.weight_decay is None else spec.adapters.weight_decay
        own = {"lr": spec.adapters.lr} if spec.adapters.lr else {}
        groups += [{**group, **own} for group in _groups(adapters, spec, decay, layers=False)]
    names = timm.optim.list_optimizers()
    if want.name not in names:
        raise RecipeError(f"timm has no optimizer '{want.name}'; {suggest(want.name, names)}")
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups, want.name, lr=want.lr, weight_decay=want.weight_decay, momentum=want.momentum, **want.args
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"optimizer '{want.name}' cannot be made: {error}") from None
    return optimizer


def _groups(module: nn.Module, spec: TrainSpec, weight_decay: float, *, layers: bool = True) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
    if layers and spec.optimizer.layer_decay:
        found = param_groups_layer_decay(module, weight_decay, exempt(), layer_decay=spec.optimizer.layer_decay)
        return list(found)
    if spec.optimizer.decay_norm_and_bias:
        return [{"params": [p for p in module.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    return list(param_groups_weight_decay(module, weight_decay, exempt()))


class LrSchedule:
    """timm's schedule, moved on after every optimizer step; plateau after every epoch.

    The rate is a function of the step, so resuming needs no state but plateau's.
    """

    def __init__(self, spec: TrainSpec, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, *, maximize: bool) -> None:
        from timm.scheduler import create_scheduler_v2

        want = spec.lr_schedule
        self.by_epoch = want.name == "plateau"
        self._scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if want.name == "constant" else want.name,
            num_epochs=max(1, epochs - want.cooldown_epochs),
            decay_rate=1.0 if want.name == "constant" else want.decay_rate,
            decay_epochs=want.step_epochs,
            decay_milestones=list(want.milestones),
            warmup_epochs=want.warmup_epochs,
            warmup_lr=want.warmup_lr,
            min_lr=want.min_lr,
            patience_epochs=want.patience,
            plateau_mode="max" if maximize else "min",
            step_on_epochs=self.by_epoch,
            updates_per_epoch=steps_per_epoch,
        )
        self.after_step(0)

    def after_step(self, steps: int) -> None:
        """Set the rate for the step that follows `steps` steps."""
        if not self.by_epoch:
            self._scheduler.step_update(steps)

    def after_epoch(self, epochs: int, metric: float) -> None:
        """Tell plateau how good the epoch was."""
        if self.by_epoch:
            self._scheduler.step(epochs, metric)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)
