"""Cross-view consistency (CRLD): the teacher's answers to two augmentations of an image teach the
student's answers to both, where the teacher is sure enough.

Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", ACM
Multimedia 2024, arXiv:2412.16493, with the weights and thresholds of the released code for
CIFAR-100. There the first view is augmented weakly and the second one strongly; here both come from
`data.augment`, which all views share. As in that code, means are over all samples, those below a
threshold count as 0, and both crossed parts take the threshold of the second view. Its
cross-entropy is the sum over both views: `cross_entropy` sees the first one, so that
`label_weight: 1` adds the other.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class CrossView(kdkit.Loss):
    """KL divergences between the two models' softened predictions of two views of an image, within
    a view and across.

    Formula: T^2 * (within * m_1 (D_11 + D_22) + across * m_2 (D_12 + D_21)) + label_weight *
    CE(z_s2, y), mean over the batch, in nats

    D_ab = KL(softmax(z_ta / T) || softmax(z_sb / T)), from the teacher's answer to view a and the
    student's to view b. m_a is 1 where the largest probability of softmax(z_ta) is at least
    view a's threshold, else 0. y are the labels, or their shares (B, K). Logits (B, K) on both
    sides, to both views.

    It needs to be shown a second augmentation: `schedule: {use: staged, second: true}`.
    """

    name = "crld"
    knowledge = "response"
    tasks = frozenset({"classes of samples"})
    needs_views = {"second": 1}

    class Options(kdkit.ResponseOptions):
        within: kdkit.Rampable = Field(
            default=2.0, ge=0, description="Factor of the divergences within a view."
        )
        across: kdkit.Rampable = Field(
            default=0.5, ge=0, description="Factor of the divergences from one view to the other."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens the predictions, not what thresholds see."
        )
        threshold: kdkit.Rampable = Field(
            default=0.9,
            ge=0,
            le=1,
            description="How sure of the first view the teacher must be, for the parts within.",
        )
        second_threshold: kdkit.Rampable = Field(
            default=0.2,
            ge=0,
            le=1,
            description="How sure of the second view the teacher must be, for the parts across.",
        )
        label_weight: kdkit.Rampable = Field(
            default=0.0, ge=0, description="Factor of the second view's cross-entropy with labels."
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        if any("second" not in outputs.views for outputs in (student, teacher)):
            raise kdkit.ShapeError(
                "crld compares two views of an image; let both models see a second one:"
                " `schedule: {use: staged, second: true}`"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o = self.options
        s_1, s_2 = student.logits, student.views["second"].logits
        t_1, t_2 = teacher.logits, teacher.views["second"].logits
        within = sure(t_1, o.threshold) * (self.divergence(t_1, s_1) + self.divergence(t_2, s_2))
        across = self.divergence(t_1, s_2) + self.divergence(t_2, s_1)
        across = sure(t_2, o.second_threshold) * across
        value = o.temperature**2 * (o.within * within + o.across * across).mean()
        # without the factor, labels need not be known
        return (
            value + o.label_weight * F.cross_entropy(s_2, batch.labels) if o.label_weight else value
        )

    def divergence(self, z_t: Tensor, z_s: Tensor) -> Tensor:
        """KL divergence of each sample, (B,)."""
        t = self.options.temperature
        log_p, log_q = F.log_softmax(z_s / t, dim=1), F.log_softmax(z_t / t, dim=1)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def sure(z: Tensor, threshold: float) -> Tensor:
    """Whether the largest probability of logits (B, K) reaches a threshold, (B,)."""
    return z.softmax(1).amax(1) >= threshold


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CrossView]
