"""Contrastive representation distillation: tell the teacher's embedding of an image from those
of images of other classes, and vice versa.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699,
section 3.1; memories, partition constants and both directions as in the released code. That code
gathers K rows of a memory for each image, (B, K, D) numbers. Here one product scores an image
against the whole memory and K of the scores are gathered: the same value and gradient. The gradient
is a product too, of a (B, M) matrix of coefficients and the memory, taken before the memory
changes, so that the memory is updated in place.

Other differences from that code: negatives are drawn with replacement, there without it where a
class leaves K of them; the 1e-7 that keeps its quotients finite is gone, as these are logarithms
from the start; only images that are trained on have a row.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kdkit


class ContrastiveRepresentation(kdkit.Loss):
    """Noise-contrastive loss of embeddings against memories of the other model's embeddings,
    positives against K negatives.

    Formula: -(log h(i, i) + sum over K negatives j of log(1 - h(i, j))), mean over the batch,
    student against the memory of the teacher's embeddings plus teacher against that of the
    student's, mean over the layer pairs; h(i, j) = P / (P + K / M), P = exp(v_i . m_j / T) / Z

    v are linear embeddings with L2 norm 1 of vectors (B, D); maps are averaged over positions,
    sequences over tokens. m is a memory with a row for each of the M images that are trained on. Z
    is M times the mean of exp(v . m / T) over the first batch and stays. After scoring, m_i becomes
    momentum * m_i + (1 - momentum) * v_i, normalised; the last one counts where a batch has an
    image twice. In eval mode neither changes. Needs images with numbers, not a stream.

    There is no option `gather`: negatives come from the memories, so each process scores its own
    images, and the mean over processes is the loss of the whole batch. Only what is remembered is
    gathered: all processes keep the same memories.
    """

    name = "crd"
    knowledge = "relation"
    # negatives are images of other classes
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_the_gradient_is_that_of_the_value": (
            "the partition constant Z, set on the first batch, is a constant"
        ),
    }

    class Options(kdkit.VectorOptions):
        negatives: int = Field(
            default=16384,
            ge=1,
            description="Images of other classes that each image is told from, K.",
        )
        size: int = Field(
            default=128, ge=1, description="Width of the embeddings and the memories."
        )
        temperature: float = Field(
            default=0.07, gt=0, description="Divides the cosine similarities."
        )
        momentum: float = Field(
            default=0.5, ge=0, lt=1, description="Share of the old embedding in a memory's update."
        )

    options: Options
    parts: nn.ModuleList
    rows: Tensor
    first: Tensor
    count: Tensor

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        if context is None or not context.num_samples:
            raise kdkit.ShapeError(
                "crd remembers each image by its number: it needs the context of a dataset with"
                " numbered images, not of a stream"
            )
        # a class's images are neighbours in the memories
        classes, order = context.labels.cpu().sort(stable=True)
        # -1: an image that is not trained on
        classes, order = classes[classes >= 0], order[classes >= 0]
        counts = classes.bincount()
        if int((counts > 0).sum()) < 2:
            raise kdkit.ShapeError(
                f"crd draws negatives from other classes, but all {len(order)} training images are"
                " of one class"
            )
        rows = torch.full((context.num_samples,), -1).scatter_(0, order, torch.arange(len(order)))
        # these three are not saved: they follow from the data
        self.register_buffer("rows", rows, persistent=False)  # by an image's number
        # by row: its class's first row
        self.register_buffer("first", (counts.cumsum(0) - counts)[classes], persistent=False)
        # by row: how many rows its class has
        self.register_buffer("count", counts[classes], persistent=False)
        pairs = self.options.pairs(student, teacher)
        self.parts = nn.ModuleList(
            Memories(s.shape[1], t.shape[1], len(order), self.options.size) for s, t in pairs
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        own = self.rows[batch.index]
        chosen = torch.cat([own[:, None], self.draw(own)], 1)
        pairs = zip(self.parts, self.options.pairs(student, teacher), strict=True)
        return torch.stack([part(*pair, chosen, self.options) for part, pair in pairs]).mean()

    def draw(self, own: Tensor) -> Tensor:
        """Rows of K images of other classes for each image, (B, K); `own` (B,) are the rows of
        these images.
        """
        first, count = self.first[own, None], self.count[own, None]
        # how many rows there are to draw from differs by class: the remainder of a large number
        # serves all, and is uniform but for M / 2^32
        number = torch.randint(2**32 - 1, (len(own), self.options.negatives), device=own.device)
        other = number % (len(self.first) - count)  # its place among the images of other classes
        return other + count * (other >= first)


class Memories(nn.Module):
    """The embeddings and memories of a layer pair."""

    student_memory: Tensor
    teacher_memory: Tensor
    partition: Tensor

    def __init__(self, student: int, teacher: int, images: int, size: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student, size), nn.Linear(teacher, size)
        reach = math.sqrt(3 / size)  # of norm 1 in the mean
        self.register_buffer("student_memory", torch.empty(images, size).uniform_(-reach, reach))
        self.register_buffer("teacher_memory", torch.empty(images, size).uniform_(-reach, reach))
        # log Z / M of the student's and the teacher's embeddings; 0 is not yet
        self.register_buffer("partition", torch.zeros(2))

    def forward(
        self, f_s: Tensor, f_t: Tensor, chosen: Tensor, options: ContrastiveRepresentation.Options
    ) -> Tensor:
        """The loss of both directions, on the rows `chosen` (B, 1 + K), the images' own first;
        then remembers the embeddings.
        """
        # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
        v_s, v_t = (
            F.normalize(self.student(f_s), eps=1e-4),
            F.normalize(self.teacher(f_t), eps=1e-4),
        )
        one, z_s = Contrast.apply(
            v_s, self.teacher_memory, chosen, self.partition[0], options.temperature
        )
        two, z_t = Contrast.apply(
            v_t, self.student_memory, chosen, self.partition[1], options.temperature
        )
        value: Tensor = one + two
        if self.training:
            # only in training: a validation or a probe must leave no trace
            self.partition.copy_(torch.stack([z_s, z_t]))
            # of all processes, so that all keep the same memories
            rows = kdkit.gather(chosen[:, 0].contiguous())
            ascending, order = rows.sort(stable=True)
            # equal rows write equal values, in whatever order
            last = order[torch.searchsorted(ascending, rows, right=True) - 1]
            for memory, v in ((self.student_memory, v_s), (self.teacher_memory, v_t)):
                new = (
                    options.momentum * memory[rows]
                    + (1 - options.momentum) * kdkit.gather(v.detach())[last]
                )
                # in place: a recorded step goes on with the same tensor
                memory.index_copy_(0, rows, F.normalize(new))
        return value


class Contrast(torch.autograd.Function):
    """Embeddings (B, D) against the rows `chosen` (B, 1 + K) of a memory (M, D), of which the
    first is the positive.

    Gives the loss in one direction, and log Z / M. The memory gets no gradient, and may change
    before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, memory: Tensor, chosen: Tensor, known: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # the whole memory in one product: gathering K rows for each image would take (B, K, D)
        scores = (v @ memory.T).div_(temperature)
        logits = scores.gather(1, chosen)
        # over all processes, so that all have one Z
        here = kdkit.gather((logits.logsumexp((0, 1)) - math.log(logits.numel()))[None])
        partition = torch.where(known == 0, here.logsumexp(0) - math.log(len(here)), known)
        logits -= partition + math.log(chosen.shape[1] - 1)  # log of P / (K / M)
        # -log h = softplus(-x) for the positive, -log(1 - h) = softplus(x) for negatives
        logits[:, 0].neg_()
        value = F.softplus(logits).sum() / len(v)
        ctx.mark_non_differentiable(partition)
        if ctx.needs_input_grad[0]:
            slope = logits.sigmoid_()
            slope[:, 0].neg_()
            # A row may be chosen several times. Counts are exact in any order, unlike sums of
            # slopes.
            coefficients = scores.zero_().scatter_add_(1, chosen, torch.ones_like(slope))
            slope *= coefficients.gather(1, chosen)
            # the finished gradient, not its parts: the memory changes before backward
            ctx.save_for_backward(
                coefficients.scatter_(1, chosen, slope) @ memory / (temperature * len(v))
            )
        return value, partition

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ContrastiveRepresentation]
