"""Normalised distillation (NKD): the label's probability as the teacher weighs it, and the other
classes among themselves.

Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the loss NKD with the T^2
of the released code. As in that code, the label of a mixed sample is the class with the largest
share.
"""

from pydantic import Field
from torch import Tensor

import kdkit

from ._classes import SeveralClasses, others


class NKD(kdkit.Loss):
    """Cross-entropies on the label, weighted by the teacher's trust in it, and among the other
    classes.

    Formula: -q_y log p_y - gamma * T^2 * sum_{c != y} q'_c log p'_c, mean over the batch, in nats

    p = softmax(z_s), q = softmax(z_t) and y is the label; p', q' are softmaxes at T over the K - 1
    classes that are not y. Logits (B, K) on both sides, K >= 2; of a mixed sample, y is the class
    with the largest share.
    """

    name = "nkd"
    knowledge = "response"

    class Options(SeveralClasses):
        gamma: kdkit.Rampable = Field(
            default=1.5, ge=0, description="Factor of the part on the classes other than the label."
        )
        temperature: kdkit.Rampable = Field(
            default=1.0, gt=0, description="T: softens the distributions over the other classes."
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        y = batch.classes[:, None]
        # at temperature 1, as in the paper: T is for the other classes only
        label = z_t.softmax(1).gather(1, y) * z_s.log_softmax(1).gather(1, y)
        soft = (others(z_t, batch.classes) / t).softmax(1)
        log_p = (others(z_s, batch.classes) / t).log_softmax(1)
        # cross-entropies, not divergences, as in the paper: the teacher's entropy is a constant
        return -label.mean() - self.options.gamma * t**2 * (soft * log_p).sum(1).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [NKD]
