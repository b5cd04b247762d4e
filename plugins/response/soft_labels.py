"""Soft labels: the labels, softened by the teacher's prediction.

Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
2021, arXiv:2006.12000, section 3, where the teacher is the student of the previous epoch (schedule
`ps_kd`) and alpha grows linearly over all epochs. It is the mixture of `cross_entropy` with weight
1 - alpha and of `logit_kl` at temperature 1 with weight alpha, but for the teacher's entropy, a
constant.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class SoftLabels(kdkit.Loss):
    """Cross-entropy of a mixture of the label and the teacher's prediction.

    Formula: -sum_k ((1 - alpha) y_k + alpha softmax(z_t)_k) log softmax(z_s)_k, mean over the
    batch, in nats

    y is the one-hot label, or the labels' own shares (B, K) when inputs are mixed. Logits (B, K) on
    both sides.
    """

    name = "soft_labels"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        alpha: kdkit.Rampable = Field(
            default=0.8,
            ge=0,
            le=1,
            description=(
                "Share of the teacher's prediction; as in the paper {from: 0, to: 0.8, epochs: all"
                " of them}."
            ),
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s, alpha = student.logits, self.options.alpha
        # mixed inputs have shares already
        y = batch.labels if batch.labels.ndim == 2 else F.one_hot(batch.labels, z_s.shape[1])
        return F.cross_entropy(z_s, (1 - alpha) * y.to(z_s) + alpha * teacher.logits.softmax(1))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SoftLabels]
