"""Cross-image relations of pixels: which pixels of the batch a pixel is like.

Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022,
arXiv:2204.06986: the mini-batch term. `cirkd_memory` has the other two. The released code loops
over the pairs of images and holds all similarities until backward; here the gradient of a chunk of
rows is computed with its value. A pixel whose features are all zero, for which that code has a
gradient near 1e12, counts as a short vector.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._pixels import Divergence, pixels_of, refuse_one_position, unit


class CrossImagePixels(kdkit.Loss):
    """KL divergence between softmaxes of a pixel's similarities to the pixels of an image.

    Formula: KL(softmax(t_i t_j^T / T) || softmax(s_i s_j^T / T)), mean over the pixels of image i
    and over all ordered pairs (i, j) of images, then over the layer pairs, in nats

    s and t are the pixels' features divided by their L2 norms; the softmax is over the pixels of j,
    and i = j is a pair. Maps (B, C, H, W), or tokens of a square grid, without an adapter: the
    numbers of channels need not agree. The student's map is resized to the teacher's (bilinear).
    It reads no labels, so it serves every task.

    With P pixels an image, time goes with (B * P)^2 * C, memory does not: similarities are held in
    chunks of 64 MB. `pool` makes P smaller. Each process relates the images of its own batch.
    """

    name = "cirkd_pixel"
    knowledge = "relation"

    class Options(kdkit.MapOptions):
        temperature: kdkit.Rampable = Field(
            default=0.1, gt=0, description="T: divides the cosine similarities."
        )
        pool: int = Field(
            default=1,
            ge=1,
            description=(
                "Both maps are first averaged over windows of this height and width; 1: not."
            ),
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        refuse_one_position(self.options, student, teacher, self.options.pool)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        divergences = []
        for f_s, f_t in self.options.pairs(student, teacher):
            f_s = kdkit.resized(f_s, f_t.shape[2:])
            s, t = (unit(self.pooled(f)).flatten(0, 1) for f in (f_s, f_t))
            images = len(f_t)
            shares = s.new_full((len(s),), 1 / (images * len(s)))
            divergences.append(
                Divergence.apply(s, s, t, t, shares, None, images, self.options.temperature)
            )
        return torch.stack(divergences).mean()

    def pooled(self, f: Tensor) -> Tensor:
        """Average windows of maps (B, C, H, W); a vector for each, (B, P, C)."""
        return pixels_of(F.avg_pool2d(f, self.options.pool, ceil_mode=True))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CrossImagePixels]
