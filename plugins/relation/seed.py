"""Self-supervised distillation: an image's similarities to a queue of others are those that the
teacher sees.

Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021,
arXiv:2101.04731, eq. 3 to 5, with the released code's order: a batch is scored against the queue
before it enters it. Teacher embeddings fill the queue, and the image's own stands in front.

The gradient of an embedding is a product with the queue, taken before the queue changes, so that
the queue is updated in place and no copy of it is made.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kdkit

from ._embeddings import VectorsOfPairs
from ._queue import Queue


class Seed(kdkit.Loss):
    """Cross-entropy between the teacher's and the student's similarities to a queue of teacher
    embeddings.

    Formula: -sum over columns of softmax([1, e_t Q] / T_t) * log softmax([e_s . e_t, e_s Q] / T_s),
    mean over the batch, then over the layer pairs

    e are embeddings with L2 norm 1 of vectors (B, D); maps are averaged over positions, sequences
    over tokens. e_s goes through a learnt head to the teacher's width first. Q holds the last
    `queue` teacher embeddings, at first random ones; in eval mode it does not change. The value of
    equal similarities is not 0, but the entropy of the teacher's.

    There is no option `gather`: each process scores its own images, and all keep one queue of the
    images of all.
    """

    name = "seed"
    knowledge = "relation"

    class Options(VectorsOfPairs):
        queue: int = Field(
            default=65536, ge=1, le=1 << 24, description="Number of embeddings in the queue."
        )
        temperature: kdkit.Rampable = Field(
            default=0.2, gt=0, description="T_s: divides the student's similarities."
        )
        teacher_temperature: kdkit.Rampable = Field(
            default=1e-4, gt=0, description="T_t: divides the teacher's similarities."
        )
        head: Literal["linear", "mlp"] = Field(
            default="mlp",
            description="From the student's width to the teacher's: linear, or two linear layers.",
        )

    options: Options
    heads: nn.ModuleList
    memories: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        pairs = list(self.options.pairs(student, teacher))
        self.heads = nn.ModuleList(self.head(f_s.shape[1], f_t.shape[1]) for f_s, f_t in pairs)
        self.memories = nn.ModuleList(Queue(self.options.queue, f_t.shape[1]) for _, f_t in pairs)

    def head(self, inside: int, outside: int) -> nn.Module:
        """From the student's width to the teacher's."""
        last = nn.Linear(inside, outside)
        if self.options.head == "linear":
            return last
        return nn.Sequential(nn.Linear(inside, inside), nn.ReLU(), last)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        pairs = self.options.pairs(student, teacher)
        for head, memory, (f_s, f_t) in zip(self.heads, self.memories, pairs, strict=True):
            # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
            e_s, e_t = F.normalize(head(f_s), eps=1e-4), F.normalize(f_t, eps=1e-4)
            values.append(
                Similarities.apply(
                    e_s,
                    e_t,
                    memory.rows,
                    self.options.temperature,
                    self.options.teacher_temperature,
                )
            )
            # only in training: a validation or a probe must leave no trace
            if self.training:
                memory(kdkit.gather(e_t))
        return torch.stack(values).mean()


class Similarities(torch.autograd.Function):
    """The loss of e_s (B, D) beside e_t (B, D), against a queue (K, D) without gradient, which may
    change before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, e_s: Tensor, e_t: Tensor, queue: Tensor, temperature: Any, of_teacher: Any
    ) -> Tensor:
        with_own = [torch.cat([(e * e_t).sum(1, keepdim=True), e @ queue.T], 1) for e in (e_s, e_t)]
        wanted = (with_own[1] / of_teacher).softmax(1)
        logs = (with_own[0] / temperature).log_softmax(1)
        if ctx.needs_input_grad[0]:
            slope = logs.exp().sub_(wanted).div_(temperature * len(e_s))
            # the finished gradient, not its parts: the queue changes before backward
            ctx.save_for_backward(slope[:, :1] * e_t + slope[:, 1:] @ queue)
        value: Tensor = -(wanted * logs).sum(1).mean()
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Seed]
