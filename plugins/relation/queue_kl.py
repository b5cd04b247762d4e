"""Distillation without labels: the teacher's embeddings of earlier images serve as classes.

LightlyTrain, method "distillation" (v1), https://github.com/lightly-ai/lightly-train, after the
idea of Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021,
arXiv:2101.04731. There it is the only loss, with mixed images (`mixup`), gradients clipped at norm
1 and LARS; version 3 adds `token_kl` with weight 1.

That code takes the part of a queue that nothing was written to for classes too; here it is left
out. There, each process keeps a queue of its own images; here all keep one of the images of all.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._embeddings import VectorsOfPairs
from ._queue import CrossEntropy, Queue, likeness


class QueueDivergence(kdkit.Loss):
    """KL divergence between the teacher's and the student's similarities to a queue of teacher
    embeddings that already holds the batch.

    Formula: KL(softmax(t Q / T) || softmax(s Q / T)), mean over the batch, in nats, then over the
    layer pairs

    t are the teacher's vectors (B, D) and s the student's, behind a learnt linear layer to the
    teacher's width, both divided by their L2 norms; maps are averaged over positions, sequences
    over tokens. Q holds the last `queue` teacher embeddings, the batch's own included; the part
    that nothing was written to does not count. In eval mode it does not change.

    There is no option `gather`: each process scores its own images, and all keep one queue of the
    images of all.
    """

    name = "queue_kl"
    knowledge = "relation"

    class Options(VectorsOfPairs):
        queue: int = Field(
            default=8192,
            ge=1,
            le=1 << 24,
            description="Number of embeddings in the queue; about half as many as images, or less.",
        )
        temperature: kdkit.Rampable = Field(
            default=0.07, gt=0, description="T: divides the similarities of both."
        )

    options: Options
    parts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.parts = nn.ModuleList(
            Part(f_s.shape[1], f_t.shape[1], self.options.queue)
            for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.parts, self.options.pairs(student, teacher), strict=True)
        return torch.stack([part(*pair, self.options.temperature) for part, pair in pairs]).mean()


class Part(nn.Module):
    """The head and the queue of a layer pair."""

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.head = nn.Linear(student, teacher)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.queue = Queue(size, teacher, empty=True)

    def forward(self, f_s: Tensor, f_t: Tensor, temperature: float) -> Tensor:
        # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
        e_s, e_t = F.normalize(self.head(f_s), eps=1e-4), F.normalize(f_t, eps=1e-4)
        rows = self.queue.holding(kdkit.gather(e_t))
        logs = likeness(e_t, rows, temperature)
        wanted = logs.exp()
        entropy = -(wanted * logs).sum(1).mean()
        value: Tensor = CrossEntropy.apply(e_s, rows, wanted, temperature) - entropy
        return value


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [QueueDivergence]
