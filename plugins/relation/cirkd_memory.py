"""Relations of pixels to those of earlier images: queues of the teacher's pixels and regions.

Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022,
arXiv:2204.06986: the two memory-based terms. `cirkd_pixel` has the mini-batch term.

Differences from the released code, which
- takes the pixels of a class from anywhere in the image, not from the class as the paper says;
- writes other pixels in each process; here all processes keep the same queues;
- begins with random vectors, which stay in the queues of rare classes; here rows that nothing was
  written to are left out;
- writes the pixels of an image in one piece, and leaves rows at a queue's end out; here it is a
  ring;
- draws the same rows of every class;
- has a second temperature for the divergence, 1, which `temperature` and the weight can express.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._pixels import (
    Divergence,
    count_classes,
    masks_at,
    membership,
    pixels_of,
    refuse_one_position,
    unit,
)


class PixelMemory(kdkit.Loss):
    """KL divergence between softmaxes of a pixel's similarities to remembered pixels and regions.

    Formula: w_p * KL(softmax(t Q_p^T / T) || softmax(s Q_p^T / T)) + w_r * the same with Q_r, mean
    over the pixels of the batch that have a class, then over the layer pairs, in nats

    t are the teacher's pixels, s the student's behind a learnt projector (1x1 convolution, batch
    normalisation, ReLU, 1x1 convolution) to the teacher's channels C, both divided by their L2
    norms. Q_p and Q_r are drawn in each step from queues of the teacher's vectors: for each class,
    pixels, and regions, the mean of a class's pixels in one image, of norm 1. The batch's own come
    first into the queues, all processes' alike; in eval mode nothing is written.

    Maps (B, C, H, W), or tokens of a square grid, beside masks of class indices. The student's map
    is resized to the teacher's (bilinear), and the masks too (nearest pixel). Pixels of value 255
    neither count nor are remembered; a batch of such pixels only gives 0.

    The queues take 4 * K * (pixel_rows + region_rows) * C bytes on the device and in each
    checkpoint: 430 MB for 19 classes and 256 channels with the paper's sizes, the default.
    """

    name = "cirkd_memory"
    knowledge = "relation"
    tasks = frozenset({"segmentation"})

    class Options(kdkit.MapOptions):
        temperature: kdkit.Rampable = Field(
            default=0.1, gt=0, description="T: divides the cosine similarities."
        )
        pixels: kdkit.Rampable = Field(
            default=1.0, ge=0, description="w_p: weight of the similarities to pixels."
        )
        regions: kdkit.Rampable = Field(
            default=1.0, ge=0, description="w_r: weight of the similarities to regions."
        )
        pixels_per_image: int = Field(
            default=16,
            ge=1,
            description="Pixels of each class that are remembered of an image, drawn at random.",
        )
        pixel_rows: int = Field(
            default=20000, ge=1, description="Length of a class's queue of pixels."
        )
        region_rows: int = Field(
            default=2000, ge=1, description="Length of a class's queue of regions."
        )
        pixel_contrast: int = Field(
            default=4096,
            ge=1,
            description="Remembered pixels of all classes, equally many of each, in a step.",
        )
        region_contrast: int = Field(
            default=1024,
            ge=1,
            description="Remembered regions of all classes, equally many of each, in a step.",
        )

    options: Options
    parts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        refuse_one_position(self.options, student, teacher)
        classes = count_classes(student, context)
        self.parts = nn.ModuleList(
            Memory(f_s.shape[1], f_t.shape[1], classes, self.options)
            for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.parts, self.options.pairs(student, teacher), strict=True)
        return torch.stack([part(*pair, batch.labels, self.options) for part, pair in pairs]).mean()


class Memory(nn.Module):
    """The projector and the queues of a layer pair."""

    def __init__(
        self, student: int, teacher: int, classes: int, options: PixelMemory.Options
    ) -> None:
        super().__init__()
        self.classes = classes
        self.projector = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            kdkit.AnyBatchNorm(teacher),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        self.pixels = Queue(classes, options.pixel_rows, teacher)
        self.regions = Queue(classes, options.region_rows, teacher)

    def forward(
        self, f_s: Tensor, f_t: Tensor, labels: Tensor, options: PixelMemory.Options
    ) -> Tensor:
        """Both terms for maps (B, C, H, W) and masks; first remembers the teacher's."""
        f_s = kdkit.resized(self.projector(f_s), f_t.shape[2:])
        s, t = unit(pixels_of(f_s)), unit(pixels_of(f_t))
        masks = masks_at(labels, f_t)
        member = membership(masks, self.classes, like=t)
        # only in training: a validation or a probe must leave no trace
        if self.training:
            self.remember(t, masks, member, options.pixels_per_image)
        counts = member.sum(2).flatten()
        shares = counts / counts.sum().clamp(min=1)
        total = s.new_zeros(())
        for weight, queue, contrast in (
            (options.pixels, self.pixels, options.pixel_contrast),
            (options.regions, self.regions, options.region_contrast),
        ):
            columns, silent = queue.draw(contrast)
            rows = s.flatten(0, 1), columns, t.flatten(0, 1), columns
            total = total + weight * Divergence.apply(*rows, shares, silent, 1, options.temperature)
        return total

    @torch.no_grad()
    def remember(self, t: Tensor, masks: Tensor, member: Tensor, count: int) -> None:
        """Write regions, and `count` pixels of each class, of every image of all processes.

        Args:
            t: the teacher's pixels, (B, P, C).
            masks: (B, P).
            member: 1 where a pixel has a class, (B, P, K).
            count: pixels of a class and image, at most.
        """
        counts = member.sum(1).long()
        drawn = places(masks, counts, min(count, t.shape[1]))
        pixels = t.gather(1, drawn.flatten(1)[..., None].expand(-1, -1, t.shape[2]))
        # of norm 1: the sum has the direction of the mean
        regions = unit(member.transpose(1, 2) @ t)
        # what was drawn, not whole maps: little is sent, and every process writes the same
        counts, regions = kdkit.gather(counts), kdkit.gather(regions)
        pixels = kdkit.gather(pixels).view(len(counts), *drawn.shape[1:], -1)
        rank = torch.arange(drawn.shape[2], device=t.device)
        self.pixels.add(pixels, rank < counts[..., None])
        self.regions.add(regions[:, :, None], counts[..., None] > 0)


class Queue(nn.Module):
    """For each of K classes, the last `length` vectors that were added."""

    rows: Tensor
    added: Tensor

    def __init__(self, classes: int, length: int, channels: int) -> None:
        super().__init__()
        self.length = length
        # the last row takes what is not to be kept, as shapes must not depend on values
        self.register_buffer("rows", torch.zeros(classes * length + 1, channels))
        self.register_buffer("added", torch.zeros(classes, dtype=torch.long))  # so far, by class

    def add(self, vectors: Tensor, is_there: Tensor) -> None:
        """Add vectors (B, K, n, C) where `is_there` (B, K, n), image by image."""
        classes, channels = vectors.shape[1], vectors.shape[3]
        # by class
        vectors = vectors.transpose(0, 1).reshape(-1, channels)
        is_there = is_there.transpose(0, 1).flatten(1)
        number = is_there.cumsum(1)
        count = number[:, -1:]
        is_kept = is_there & (number > count - self.length)
        first = torch.arange(classes, device=vectors.device)[:, None] * self.length
        place = first + (self.added[:, None] + number - 1) % self.length
        place = torch.where(is_kept, place, len(self.rows) - 1).flatten()
        # the last row gets zeros only, so that it is the same in whatever order it is written
        vectors = vectors.masked_fill(~is_kept.flatten()[:, None], 0.0)
        # in place: a recorded step goes on with the same tensors
        self.rows.index_copy_(0, place, vectors)
        self.added.add_(count[:, 0])

    def draw(self, contrast: int) -> tuple[Tensor, Tensor]:
        """Draw rows of all classes together, equally many of each, without repetition.

        Returns:
            The rows (M, C), and which of them nothing was written to, (M,).
        """
        classes = len(self.added)
        each = min(self.length, math.ceil(contrast / classes))
        row = torch.arange(self.length, device=self.rows.device)
        is_filled = row < self.added[:, None]
        keys = torch.rand(classes, self.length, device=self.rows.device)
        # rows that nothing was written to come last
        chosen = keys.masked_fill(~is_filled, -1.0).topk(each, dim=1)
        first = torch.arange(classes, device=self.rows.device)[:, None] * self.length
        rows = self.rows.index_select(0, (first + chosen.indices).flatten())
        return rows, chosen.values.flatten() < 0


def places(masks: Tensor, counts: Tensor, count: int) -> Tensor:
    """Draw `count` pixels of each class in each image, (B, K, count), without repetition.

    Where an image has fewer of a class, `counts` (B, K), the last ones are pixels of other classes.
    """
    # ordered by class, at random within each; 255 is last. With 1 instead of 1/2 the largest sums
    # would round up to the next class.
    order = (masks + 0.5 * torch.rand(masks.shape, device=masks.device)).argsort(1)
    first = counts.cumsum(1) - counts
    rank = torch.arange(count, device=masks.device)
    wanted = (first[..., None] + rank).clamp(max=masks.shape[1] - 1)
    return order.gather(1, wanted.flatten(1)).view_as(wanted)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PixelMemory]
