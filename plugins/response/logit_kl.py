"""Soft targets: the student's class distribution follows the teacher's, both softened by a
temperature.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531,
section 2. The paper writes a cross-entropy with the soft targets; the KL divergence differs from it
by the teacher's entropy, a constant, and is 0 when both agree. `standardize`: Sun et al., "Logit
Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1; a row of equal
logits, for which the released code divides by 1e-7, counts as uniform and has no gradient here.

`scale: std` is NormKD: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023,
arXiv:2308.00520, whose factor of the deviation, here `temperature`, is 2; a row of equal logits,
for which the released code gives NaN, has no gradient here. `scale: max` is DTKD: Wei, Bai,
"Dynamic Temperature Knowledge Distillation", 2024, arXiv:2404.12711; it adds three times this form
and once the plain one to the cross-entropy. Its temperatures are negative where a row's largest
logit is, and infinite where the two sum to 0: such samples have T on both sides here. `swap`: Wen,
Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision",
Neurocomputing 2021, arXiv:1911.07471, the probability shift.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

import kdkit


class LogitKL(kdkit.Loss):
    """KL divergence between the teacher's and the student's softened predictions.

    Formula: T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch, in nats

    With `standardize`, z becomes (z - mean) / (1e-7 + unbiased standard deviation) per sample
    first, on both sides. With `only_correct`, the mean is over the samples whose largest teacher
    logit is the label's (0 if there is none). T^2 keeps the gradient's size when T changes. Logits
    (B, K) on both sides.

    With `scale`, each sample has its own temperatures T_t and T_s, and T_t^2 or T_t T_s in the
    place of T^2:
    std: T_t = T std_t and T_s = T std_s, with T_t^2; std is the row's unbiased standard deviation,
    and the gradient passes through std_s;
    max: T_t = 2 M_t / (M_s + M_t) T and T_s = 2 M_s / (M_s + M_t) T, with T_t T_s; M is the row's
    largest logit, and the gradient passes through M_s. T on both sides where an M is below 1e-3.
    Adding a constant to all logits changes this form.
    With `swap`, the teacher's largest logit and the label's are exchanged first; of a mixed sample,
    the label is the class with the largest share.
    """

    name = "logit_kl"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )
        standardize: bool = Field(
            default=False,
            description="Give every sample's logits mean 0 and deviation 1 first, on both sides.",
        )
        only_correct: bool = Field(
            default=False,
            description="Learn only from samples that the teacher classifies correctly.",
        )
        swap: bool = Field(
            default=False,
            description="Exchange the teacher's largest logit and the label's first.",
            json_schema_extra={"later": True},
        )
        scale: Literal["std", "max"] | None = Field(
            default=None,
            description=(
                "What changes the temperature (default: nothing). `std`: T times each row's"
                " deviation (NormKD, T 2); `max`: by each sample's largest logits (DTKD)."
            ),
            json_schema_extra={"later": True},
        )

        @model_validator(mode="after")
        def _fits(self) -> "LogitKL.Options":
            if self.standardize and self.scale:
                raise ValueError("standardize and scale both change the logits' size; use one")
            if self.only_correct and self.swap:
                # nothing is exchanged where the teacher is right
                raise ValueError("swap has no effect on samples that only_correct leaves; use one")
            return self

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        correct = (
            z_t.argmax(1) == batch.classes
            if self.options.only_correct
            else torch.ones_like(z_t[:, 0], dtype=torch.bool)
        )
        if self.options.swap:
            z_t = swapped(z_t, batch.classes[:, None])
        if self.options.standardize:
            z_s, z_t = kdkit.standardized(z_s), kdkit.standardized(z_t)
        factor: Tensor | float = 1.0
        if self.options.scale:
            z_s, z_t, factor = SCALES[self.options.scale](z_s, z_t)
        log_p, log_q = F.log_softmax(z_s / t, dim=1), F.log_softmax(z_t / t, dim=1)
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        # a product, not a selection: the host would wait for its size
        # where the teacher gets none right: 0 / 1, not 0 / 0
        return t**2 * (divergence * factor * correct).sum() / correct.sum().clamp_min(1)


def swapped(z: Tensor, classes: Tensor) -> Tensor:
    """Logits (B, K) with the largest of a row and that of its class (B, 1) exchanged."""
    top = z.argmax(1, keepdim=True)
    return z.scatter(1, top, z.gather(1, classes)).scatter(1, classes, z.gather(1, top))


def by_deviation(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both divided by their rows' deviations, and the factor that belongs to that, (B,)."""
    variance = (z_t - z_t.mean(1, keepdim=True)).square().sum(1) / max(z_t.shape[1] - 1, 1)
    # the softmax does not see that they are centred too
    return kdkit.standardized(z_s), kdkit.standardized(z_t), variance


def by_largest(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both divided by their rows' largest logits, relative to the mean of the two, and the factor
    that belongs to that, (B,).
    """
    m_s, m_t = z_s.amax(1, keepdim=True), z_t.amax(1, keepdim=True)
    usable = torch.minimum(m_s, m_t) >= 1e-3
    # before the division: a quotient by a number near 0 would have a huge gradient
    m_s, m_t = m_s.where(usable, 1.0), m_t.where(usable, 1.0)
    mean = (m_s + m_t) / 2
    return z_s * (mean / m_s), z_t * (mean / m_t), (m_s * m_t / mean**2)[:, 0]


SCALES = {"std": by_deviation, "max": by_largest}


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LogitKL]
