"""Gathers the batch of all processes in each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor) -> Tensor:
    """Gather the rows of all processes in order, (B, ...) to (world * B, ...); of one: `x`.

    All processes must call it with the same number of rows.

    The gradient of a process's rows is summed over all processes' losses. A data-parallel trainer
    then averages the parameters' gradients, so that a loss which each process computes on all rows
    has the gradient it has in a single process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    # not `all_gather` alone: it has no gradient, and would cut off the rows of the other processes
    rows: Tensor = _Gather.apply(x)
    return rows


def share_of_mean(count: Tensor | int, device: torch.device, least: int = 0) -> Tensor | float:
    """Return this process's count, divided by the mean over all processes; of one: 1.

    Multiplied by it, a mean over the rows of a process has its weight in the mean over the rows of
    all. All processes must call it.

    Args:
        count: of rows.
        device: where it is added up.
        least: what a sum is divided by where there are fewer rows, in one process as in several.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 1.0
    own = torch.as_tensor(count, dtype=torch.float32, device=device)
    total = own.clone()
    dist.all_reduce(total)
    # without a row anywhere, every share is 0
    return own.clamp(min=least) * dist.get_world_size() / total.clamp(min=1.0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = len(x)
        # backends transfer contiguous memory only, and `empty_like` would keep the input's strides
        everyone = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size())
        ]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.size, ctx.size)
