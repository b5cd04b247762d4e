"""A virtual teacher (Tf-KD, regularisation): soft targets made by hand, with no more than the
label in them.

Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing Regularization",
CVPR 2020, arXiv:1909.11723, section 4: the virtual teacher p^d and the KL term of L_reg; its
cross-entropy and both weights are the recipe's. The factor T^2, as in `logit_kl`, is not the
paper's. The released code softens the probabilities themselves, softmax(u / T), instead of their
logarithms, leaves the student at T = 1 (`soften_student: false`), divides by the number of classes
too, and multiplies by 1 or 100.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class VirtualTeacher(kdkit.Loss):
    """KL divergence between a hand-made distribution around the label and the student's
    prediction, both softened.

    Formula: T_s^2 * KL(softmax(log u / T) || softmax(z_s / T_s)), mean over the batch, in nats

    u_k = a for the label and (1 - a) / (K - 1) for every other class; T_s = T, or 1 without
    `soften_student`. Of mixed inputs, u is the mean over the labels by their shares (B, K). Student
    logits (B, K); there is no teacher to run, so it costs nothing.
    """

    name = "virtual_teacher"
    knowledge = "labels"

    class Options(kdkit.LossOptions):
        correct: float = Field(
            default=0.99,
            gt=0,
            lt=1,
            description="a: the virtual teacher's probability of the label, before softening.",
        )
        temperature: kdkit.Rampable = Field(
            default=20.0, gt=0, description="T: softens the virtual teacher."
        )
        soften_student: bool = Field(
            default=True, description="Soften the student's prediction by T as well."
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        z_s = student.logits
        if (
            z_s.ndim != 2
            or z_s.shape[1] < 2
            or (context is not None and z_s.shape[1] != context.outputs)
        ):
            wanted = f"(B, {context.outputs})" if context is not None else "(B, K)"
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(z_s.shape)} do not fit the labels, which need"
                f" {wanted} of at least two classes; give the student one logit per class of the"
                " dataset"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z = student.logits
        a = self.options.correct
        t = self.options.temperature
        shares = (
            F.one_hot(batch.labels, z.shape[1]) if batch.labels.ndim == 1 else batch.labels
        ).to(z.dtype)
        # nowhere 0, as `correct` lies between 0 and 1: its logarithm is finite
        u = a * shares + (1 - a) / (z.shape[1] - 1) * (1 - shares)
        t_s = t if self.options.soften_student else 1.0
        log_q, log_p = F.log_softmax(u.log() / t, dim=1), F.log_softmax(z / t_s, dim=1)
        return t_s**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [VirtualTeacher]
