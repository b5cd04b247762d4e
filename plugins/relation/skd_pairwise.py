"""Pair-wise structured distillation: regions of an image that are alike to the teacher are alike to
the student.

Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019,
arXiv:1903.04197: the pair-wise term. The authors' code pools windows of half the map's height and
width, and takes the norms as constants. The form by which later papers compare (that of CIRKD's
code) pools windows of 2 x 2, the default here, and learns through the norms, as here. Both ask for
maps of equal size; here the student's is resized. A pixel whose features are all zero, for which
they have a gradient of 1e8 and more, counts as a short vector.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._pixels import pixels_of, refuse_one_position, unit


class PairWise(kdkit.Loss):
    """Mean squared difference between the two models' cosine similarities of regions of an image.

    Formula: (A_s - A_t)^2 with A = v v^T, v the features of P regions divided by their L2 norms,
    mean over the batch and the P^2 pairs of regions, then over the layer pairs

    A region is the maximum of each channel over a window of `pool` x `pool` pixels. Maps
    (B, C, H, W), or tokens of a square grid; the numbers of channels need not agree, and the
    student's map is resized to the teacher's (bilinear). Takes 4 * B * P^2 bytes for each of a few
    copies: with P = 64 x 64 and 8 images, 512 MB; a larger `pool` makes P smaller. It reads no
    labels, so it serves every task.
    """

    name = "skd_pairwise"
    knowledge = "relation"

    class Options(kdkit.MapOptions):
        pool: int = Field(
            default=2,
            ge=1,
            description="Height and width of a region in pixels of the teacher's layer.",
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        refuse_one_position(self.options, student, teacher, self.options.pool)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for f_s, f_t in self.options.pairs(student, teacher):
            f_s = kdkit.resized(f_s, f_t.shape[2:])
            errors.append(F.mse_loss(self.affinities(f_s), self.affinities(f_t)))
        return torch.stack(errors).mean()

    def affinities(self, f: Tensor) -> Tensor:
        """Cosine similarities of the regions of maps (B, C, H, W), (B, P, P)."""
        # `ceil_mode`: the last windows may be smaller, so that no pixel is left out
        v = unit(pixels_of(F.max_pool2d(f, self.options.pool, ceil_mode=True)))
        return v @ v.transpose(1, 2)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PairWise]
