"""Intra-class feature variation: how far each pixel is from the mean of its class, as the teacher
has it.

Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020,
https://www.ecva.net/papers/eccv_2020/papers_ECCV/html/230_ECCV_2020_paper.php. The released code
counts pixels without a class as pixels that agree, so that the value shrinks with their number;
here they are left out of the mean. Its loop over the classes is a product here. The nearest pixel
of a mask is found by the pixels' centres here, by their corners there.
"""

import torch
from torch import Tensor

import kdkit

from ..relation._pixels import (
    count_classes,
    masks_at,
    membership,
    pixels_of,
    refuse_one_position,
    unit,
)


class IntraClassVariation(kdkit.Loss):
    """Mean squared difference between the two models' cosine similarities of a pixel to its class.

    Formula: (cos(f_s, m_s) - cos(f_t, m_t))^2, mean over the pixels of the batch that have a class,
    then over the layer pairs; m is the mean of f over the pixels of the same class in the same
    image

    Gradients reach the pixels and, through m, their class. Maps (B, C, H, W), or tokens of a square
    grid, beside masks of class indices; the numbers of channels need not agree. The student's map
    is resized to the teacher's (bilinear), and the masks too (nearest pixel). Pixels of value 255
    neither count nor enter a mean; a batch of such pixels only gives 0. Vectors with a norm below
    1e-3 count as shorter ones, and a zero has the cosine 0.

    In several processes, each has its own mean, whatever its number of pixels.
    """

    name = "ifvd"
    knowledge = "feature"
    tasks = frozenset({"segmentation"})
    Options = kdkit.MapOptions
    options: kdkit.MapOptions
    classes: int

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        refuse_one_position(self.options, student, teacher)
        self.classes = count_classes(student, context)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for f_s, f_t in self.options.pairs(student, teacher):
            f_s = kdkit.resized(f_s, f_t.shape[2:])
            member = membership(masks_at(batch.labels, f_t), self.classes, like=f_s)
            difference = cosines(f_s, member) - cosines(f_t, member)
            errors.append(difference.square().sum() / member.sum().clamp(min=1))
        return torch.stack(errors).mean()


def cosines(f: Tensor, member: Tensor) -> Tensor:
    """Cosine of each pixel of maps (B, C, H, W) to the mean of its class, (B, H * W); 0 without a
    class. `member` (B, H * W, K) is 1 where a pixel has a class.
    """
    v = pixels_of(f)
    # products with 0 and 1: a sum by index has no fixed order on a GPU
    means = (member.transpose(1, 2) @ v) / member.sum(1).clamp(min=1)[..., None]
    return (unit(v) @ unit(means).transpose(1, 2) * member).sum(2)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [IntraClassVariation]
