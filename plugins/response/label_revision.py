"""Label revision: the teacher's logits where it is right; where it is wrong, its probabilities
mixed with the label, so that the label is the likeliest class.

Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", IEEE
Transactions on Cognitive and Developmental Systems 2024, arXiv:2404.03693: label revision, without
the selection of data. No code of its authors was seen; the parts and the weights are those of the
re-implementation beside "Knowledge Distillation with Refined Logits" (arXiv:2408.07703), which uses
no other cross-entropy. The parts are means over two groups of samples, so that the value depends on
which samples share a batch.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class LabelRevision(kdkit.Loss):
    """Cross-entropy and squared error of the logits on samples that the teacher gets right, squared
    error from revised probabilities on the others.

    Formula: mean_R CE(z_s, y) + logit_weight * mean_R (z_s - z_t)^2 + revision_weight * mean_W
    (p - (b q + (1 - b) e_y))^2, squared errors as a mean over the classes too

    R are the samples of the batch whose largest teacher logit is the label's, W the others; a mean
    over none is 0. p = softmax(z_s), q = softmax(z_t), e_y is the one-hot label or the labels'
    shares (B, K), b = eta / (max q - q_y + 1); of a mixed sample, y is the class with the largest
    share. The cross-entropy is in nats. Logits (B, K) on both sides.
    """

    name = "label_revision"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        logit_weight: kdkit.Rampable = Field(
            default=4.0, ge=0, description="Factor of the logits' error where the teacher is right."
        )
        revision_weight: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the probabilities' error where the teacher is wrong.",
        )
        eta: kdkit.Rampable = Field(
            default=0.8,
            ge=0,
            le=1,
            description=(
                "Largest share of the teacher in revised probabilities; the rest is the label."
            ),
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s, z_t = student.logits, teacher.logits
        right = z_t.argmax(1) == batch.classes
        cross_entropy = F.cross_entropy(z_s, batch.labels, reduction="none")
        logits = (z_s - z_t).square().mean(1)
        revised = (z_s.softmax(1) - self.revised(z_t, batch)).square().mean(1)
        return mean_where(
            right, cross_entropy + self.options.logit_weight * logits
        ) + self.options.revision_weight * mean_where(~right, revised)

    def revised(self, z_t: Tensor, batch: kdkit.Batch) -> Tensor:
        """The teacher's probabilities mixed with the label, (B, K)."""
        q = z_t.softmax(1)
        label = batch.labels if batch.labels.ndim == 2 else F.one_hot(batch.labels, q.shape[1])
        excess = q.amax(1, keepdim=True) - q.gather(1, batch.classes[:, None])
        b = self.options.eta / (excess + 1)
        return b * q + (1 - b) * label.to(q)


def mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Mean over the chosen ones of values (B,); 0 if there is none."""
    # a product, not a selection: the host would wait for its size
    return (values * chosen).sum() / chosen.sum().clamp_min(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LabelRevision]
