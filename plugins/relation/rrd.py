"""Relational representation distillation: an image's similarities to a queue of others are softly
those that the teacher sees.

Giakoumoglou and Stathaki, "Relational Representation Distillation", 2024, arXiv:2407.12073; heads,
temperatures and reduction as in the released code. It has weight 1 there, beside `cross_entropy`
with weight 1, and `logit_kl` with weight 1 or without it.

As in that code, the teacher's head keeps its random weights: it is used for constants only. Other
than there, the queue begins with rows of length 1 (the code normalises columns), and its length
need not be a multiple of the batch's. That code also has a variant with two memories, which
exponentiates twice and overflows; it is left out.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._embeddings import VectorsOfPairs
from ._queue import CrossEntropy, Queue, likeness


class RelationalRepresentation(kdkit.Loss):
    """Cross-entropy between the teacher's and the student's similarities to a queue of teacher
    embeddings that already holds the batch.

    Formula: -sum over rows of softmax(e_t Q / T_t) * log softmax(e_s Q / T_s), mean over the batch,
    then over the layer pairs

    e are linear embeddings with L2 norm 1 of vectors (B, D); maps are averaged over positions,
    sequences over tokens. The student's head is learnt, the teacher's is random and rests. Q holds
    the last `queue` teacher embeddings, the batch's own included, at first random ones; in eval
    mode it does not change. The value of equal similarities is not 0, but the entropy of the
    teacher's.

    There is no option `gather`: each process scores its own images, and all keep one queue of the
    images of all.
    """

    name = "rrd"
    knowledge = "relation"

    class Options(VectorsOfPairs):
        queue: int = Field(
            default=16384, ge=1, le=1 << 24, description="Number of embeddings in the queue."
        )
        temperature: kdkit.Rampable = Field(
            default=0.1, gt=0, description="T_s: divides the student's similarities."
        )
        teacher_temperature: kdkit.Rampable = Field(
            default=0.02, gt=0, description="T_t: divides the teacher's similarities."
        )
        size: int = Field(default=128, ge=1, description="Width of the embeddings and the queue.")

    options: Options
    parts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.parts = nn.ModuleList(
            Part(f_s.shape[1], f_t.shape[1], self.options)
            for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.parts, self.options.pairs(student, teacher), strict=True)
        return torch.stack([part(*pair, self.options) for part, pair in pairs]).mean()


class Part(nn.Module):
    """The heads and the queue of a layer pair."""

    def __init__(
        self, student: int, teacher: int, options: RelationalRepresentation.Options
    ) -> None:
        super().__init__()
        self.student = nn.Linear(student, options.size)
        self.teacher = nn.Linear(teacher, options.size).requires_grad_(False)
        self.queue = Queue(options.queue, options.size)

    def forward(
        self, f_s: Tensor, f_t: Tensor, options: RelationalRepresentation.Options
    ) -> Tensor:
        # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
        e_s = F.normalize(self.student(f_s), eps=1e-4)
        e_t = F.normalize(self.teacher(f_t), eps=1e-4).detach()
        rows = self.queue.holding(kdkit.gather(e_t))
        wanted = likeness(e_t, rows, options.teacher_temperature).exp()
        value: Tensor = CrossEntropy.apply(e_s, rows, wanted, options.temperature)
        return value


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [RelationalRepresentation]
