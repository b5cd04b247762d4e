"""Cross-entropy on the labels: the supervised term that most recipes keep beside a distillation
term.

Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR
2016, arXiv:1512.00567, section 7. Labels as shares of classes: Zhang et al., "mixup: Beyond
Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412. As in both, smoothing gives every class,
the right one included, label_smoothing / K. Balanced weights: King and Zeng, "Logistic Regression
in Rare Events Data", Political Analysis 2001.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class CrossEntropy(kdkit.Loss):
    """Cross-entropy between the labels and the student's prediction.

    Formula: -sum_k w_k y_k log softmax(z_s)_k, mean over the batch, in nats

    y is the one-hot label, or the labels' own shares (B, K) when inputs are mixed; smoothed, it is
    (1 - label_smoothing) y + label_smoothing / K. w is 1, or `class_weights`: the mean is over
    samples, not over weights, so that a sample counts alike in every batch. Student logits (B, K);
    the teacher is not read.
    """

    name = "cross_entropy"
    knowledge = "labels"

    class Options(kdkit.LossOptions):
        label_smoothing: float = Field(
            default=0.0,
            ge=0,
            lt=1,
            description="Share of the target that is spread evenly over all classes.",
        )
        class_weights: Literal["balanced"] | tuple[Annotated[float, Field(ge=0)], ...] | None = (
            Field(
                default=None,
                description=(
                    "Weight of each class, K numbers; balanced: N / (K n_k), of N training samples"
                    " of which n_k are of class k, so that every class counts alike (none: 1)."
                ),
            )
        )

    options: Options
    weights: Tensor | None

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.register_buffer("weights", None, persistent=False)  # they follow from the data

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        z_s = student.logits
        if z_s.ndim != 2 or (context is not None and z_s.shape[1] != context.outputs):
            wanted = f"(B, {context.outputs})" if context is not None else "(B, K)"
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(z_s.shape)} do not fit the labels, which need"
                f" {wanted}; give the student one logit per class of the dataset"
            )
        # once: the labels of all samples do not change
        self.weights = self._weights(z_s.shape[1], context)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        smoothing = self.options.label_smoothing
        if self.weights is None:
            return F.cross_entropy(student.logits, batch.labels, label_smoothing=smoothing)
        weights = self.weights.to(student.logits)
        # not torch's own mean, which divides by the weights of the batch
        each = F.cross_entropy(
            student.logits, batch.labels, weights, label_smoothing=smoothing, reduction="none"
        )
        return each.mean()

    def _weights(self, num_classes: int, context: kdkit.Context | None) -> Tensor | None:
        asked = self.options.class_weights
        if asked is None:
            return None
        if asked != "balanced":
            if len(asked) != num_classes:
                raise kdkit.ShapeError(
                    f"{self.name}: {len(asked)} class_weights for {num_classes} classes"
                )
            return torch.tensor(asked)
        if context is None or not len(context.labels):
            raise kdkit.ShapeError(
                f"{self.name}: class_weights: balanced needs the labels of all training samples;"
                f" write the {num_classes} weights out"
            )
        # -1: a sample that is not trained on
        counts = context.labels[context.labels >= 0].bincount(minlength=num_classes)
        # the weight of a class without samples is never used, but must be finite
        return counts.sum() / (num_classes * counts.clamp(min=1)).float()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CrossEntropy]
