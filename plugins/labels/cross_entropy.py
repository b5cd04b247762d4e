"""Cross-entropy on the labels: the supervised term that most recipes keep beside a distillation term.

Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, arXiv:1512.00567,
section 7. Labels as shares of classes: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
arXiv:1710.09412. As in both, smoothing gives every class, the right one included, label_smoothing / K.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class CrossEntropy(kdkit.Loss):
    """Cross-entropy between the labels and the student's prediction.

    Formula: -sum_k y_k log softmax(z_s)_k, mean over the batch, in nats

    y is the one-hot label, or the labels' own shares (B, K) when inputs are mixed; smoothed, it is
    (1 - label_smoothing) y + label_smoothing / K. Student logits (B, K); the teacher is not read.
    """

    name = "cross_entropy"
    knowledge = "labels"

    class Options(kdkit.LossOptions):
        label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target that is spread evenly over all classes.")

    options: Options

    def setup(self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None) -> None:
        z_s = student.logits
        if z_s.ndim != 2 or (context is not None and z_s.shape[1] != context.num_classes):
            wanted = f"(B, {context.num_classes})" if context is not None else "(B, K)"
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(z_s.shape)} do not fit the labels, which need {wanted}; "
                "give the student one logit per class of the dataset"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        return F.cross_entropy(student.logits, batch.labels, label_smoothing=self.options.label_smoothing)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CrossEntropy]
