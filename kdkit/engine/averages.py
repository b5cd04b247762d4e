"""Moving averages of a student's weights (`train.ema`), by timm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from kdkit.errors import RunError
from kdkit.recipe.sections import TrainSpec


class Average:
    """The moving average of one network's weights.

    Attributes:
        module: the network with the averaged weights.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool) -> None:
        # timm takes seconds to import, and few recipes average
        from timm.utils import ModelEmaV3

        self._ema = ModelEmaV3(network, decay=decay, use_warmup=warmup)
        self.module: nn.Module = self._ema.module
        # such as the ranges of an observer that has seen nothing: they follow the network
        self._without_mean = [
            name for name, buffer in network.named_buffers() if not buffer.isfinite().all()
        ]

    def changing_share(self, steps: int) -> float | None:
        """Return the share of the network in its average after `steps` steps, 1 - decay in fp32;
        None if it stays the same from step to step.
        """
        decay = self._ema.get_decay(steps)
        return float(np.float32(1 - decay)) if self._ema.use_warmup else None

    def take_in(self, network: nn.Module, steps: int, share: Any = None) -> None:
        """Update the average with a network that has done `steps` steps.

        Args:
            network: the one that is averaged.
            steps: its optimizer steps.
            share: of the network, where it changes; a tensor in a step that is recorded.

        Raises:
            RunError: the network has changed its shape.
        """
        try:
            # on a GPU also in plain steps, so that recorded ones do the same arithmetic
            if isinstance(share, torch.Tensor) or (share is not None and self._is_on_gpu):
                self._move(network, share)
            else:
                self._ema.update(network, step=steps)
            for name in self._without_mean:
                self.module.get_buffer(name).copy_(network.get_buffer(name))
        # shapes differ: the network was pruned, or its buffers have grown
        except RuntimeError:
            theirs = self.module.state_dict()
            changed = [
                name
                for name, value in network.state_dict().items()
                if name not in theirs or theirs[name].shape != value.shape
            ]
            if not changed:
                raise
            says = f"step {steps}: the student's '{changed[0]}' has another shape than at the start"
            raise RunError(
                f"{says}, so that `train.ema` has no mean to take; leave it out"
            ) from None

    @property
    def _is_on_gpu(self) -> bool:
        return any(p.device.type == "cuda" for p in self.module.parameters())

    @torch.no_grad()
    def _move(self, network: nn.Module, share: Any) -> None:
        """Update by a share in a tensor, which timm's foreach functions do not take."""
        values = zip(self.module.state_dict().values(), network.state_dict().values(), strict=True)
        averaged, new = [], []
        for old, value in values:
            if old.is_floating_point():
                averaged.append(old)
                new.append(value)
            else:
                old.copy_(value)
        steps = torch._foreach_sub(new, averaged)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(averaged, steps)


def average_of(network: nn.Module, spec: TrainSpec) -> Average | None:
    """Return the average that the recipe asks for; None if it asks for none."""
    return Average(network, spec.ema.decay, spec.ema.warmup) if spec.ema else None
