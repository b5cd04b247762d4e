"""What losses share that compare embeddings with a queue of earlier ones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Queue(nn.Module):
    """The last K embeddings, (K, D); the oldest make room.

    Args:
        size: K.
        width: D.
        empty: begin with rows of zeros, which stand for none, instead of random unit vectors.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, size: int, width: int, *, empty: bool = False) -> None:
        super().__init__()
        rows = torch.zeros(size, width) if empty else F.normalize(torch.randn(size, width))
        self.register_buffer("rows", rows)
        # where the next one goes: a tensor, so that a recorded step goes on from there
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, new: Tensor) -> None:
        """Write embeddings (N, D) over the oldest; of more than K, the last ones."""
        new, places = self._at(new)
        # in place: a recorded step goes on with the same tensors
        self.rows.index_copy_(0, places, new)
        self.place.copy_((self.place + len(new)) % len(self.rows))

    def holding(self, new: Tensor) -> Tensor:
        """Return the rows with embeddings (N, D) in place of the oldest.

        In eval mode it is a copy: a validation or a probe must leave no trace.
        """
        if self.training:
            self(new)
            return self.rows
        new, places = self._at(new)
        return self.rows.index_copy(0, places, new)

    def _at(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return what will be kept of new embeddings, and where it goes."""
        size = len(self.rows)
        new = new[-size:].to(self.rows.dtype)
        return new, (self.place + torch.arange(len(new), device=new.device)) % size


def likeness(e: Tensor, queue: Tensor, temperature: Any) -> Tensor:
    """Return the log-softmax of the products of embeddings (B, D) with the rows of a queue (K, D),
    divided by a temperature; rows of zeros stand for none and have no share.
    """
    # not minus infinity: the difference of two is NaN
    nothing = torch.finfo(e.dtype).min / 2
    logits: Tensor = e @ queue.T / temperature
    return logits.masked_fill(~queue.any(1), nothing).log_softmax(1)


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy between wanted shares of a queue's rows (B, K) and the softmax of the products
    of embeddings e (B, D) with them, mean over the batch.

    The queue (K, D) has no gradient, and may change before backward.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, queue: Tensor, wanted: Tensor, temperature: Any) -> Tensor:
        logs = likeness(e, queue, temperature)
        value: Tensor = -(wanted * logs).sum(1).mean()
        if ctx.needs_input_grad[0]:
            slope = logs.exp().sub_(wanted).div_(temperature * len(e))
            # the finished gradient, not its parts: the queue changes before backward
            ctx.save_for_backward(slope @ queue)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None
