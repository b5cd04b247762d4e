"""Class attention transfer: for every class, the student looks where the teacher looks.

Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv:2304.12777,
section 3; pooling, normalisation and mean over all elements as in the released code. That code
turns both classifiers into 1x1 convolutions in front of the pooling; here the networks stay as they
are, and the maps come from the classifiers' weights, without the bias, as in the paper's equation.
Pooling comes before the weights, which is the same and cheaper. Maps of norm below 1e-5 count as
none, where the code divides by 1e-12.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._heads import classifiers


class ClassAttention(kdkit.Loss):
    """Mean squared difference of class activation maps of unit length.

    Formula: (M(f_s, W_s) - M(f_t, W_t))^2 with M(f, W) = normalise(W pool(f)), mean over the batch,
    the classes and the positions

    W are the classifiers' weights (K, C): the teacher's are constant, the student's are its own and
    learn. `pool` averages to r x r, `normalise` divides each class's map by its L2 norm over the
    positions. One pair of layers, the last maps (B, C, H, W) before the pooling, or tokens of a
    square grid; both networks' heads must be pooling and a linear layer, over the same K classes.
    """

    name = "cat_kd"
    knowledge = "feature"
    # by them it is checked that the heads are pooling and a linear layer
    needs_teacher_logits = True
    # the maps are made of the classifiers' weights
    needs_networks = True

    class Options(kdkit.MapOptions):
        r: int = Field(
            default=2, ge=2, le=64, description="Height and width of the maps that are compared."
        )

    options: Options
    teacher_classifier: nn.Linear
    student_classifier: tuple[nn.Linear]  # it is the student's part, not the loss's

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        own, self.teacher_classifier = classifiers(self.options, student, teacher, context)
        # a tuple hides it from `parameters()` and `state_dict()`: the student trains and saves it
        self.student_classifier = (own,)
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        pair = self.options.layers[0]
        if min(f_s.shape[2:].numel(), f_t.shape[2:].numel()) == 1:
            shapes = (
                f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                f" {tuple(f_t.shape)}"
            )
            raise kdkit.ShapeError(
                f"{shapes} must have several positions: of one there is no map; take larger images"
                " or a finer layer"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        # features come in fp32 at least, the student's weights in their own type
        own = self.student_classifier[0].weight.to(f_s.dtype)
        return F.mse_loss(
            maps(f_s, own, self.options.r),
            maps(f_t, self.teacher_classifier.weight, self.options.r),
        )


def maps(f: Tensor, weight: Tensor, r: int) -> Tensor:
    """Maps (B, C, H, W) and a classifier's weights (K, C) to activation maps of unit length, (B,
    K, r * r).
    """
    return F.normalize(
        torch.matmul(weight, F.adaptive_avg_pool2d(f, r).flatten(2)), dim=2, eps=1e-5
    )


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ClassAttention]
