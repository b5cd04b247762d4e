"""Relation matching (DIST): the student's probabilities correlate with the teacher's, per sample
and per class.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536:
inter-class and intra-class relations by Pearson's correlation; tau^2 and the 1e-8 as in the
released code. Where the student's probabilities hardly vary and the teacher's do, that code's slope
reaches 1e8; a correlation whose slope would exceed 1e5 counts as 0 and has no gradient here.
"""

from pydantic import Field
from torch import Tensor

import kdkit

from ._correlation import correlation


class DIST(kdkit.Loss):
    """Lack of correlation between the two models' probabilities, over the classes of a sample
    and over the samples of a class.

    Formula: tau^2 * (beta * (1 - mean_n r(p_n, q_n)) + gamma * (1 - mean_c r(p_c, q_c))), no unit

    p = softmax(z_s / tau), q = softmax(z_t / tau); p_n is the row of a sample (K), p_c the column
    of a class (B); r(a, b) is the inner product of a - mean(a) and b - mean(b) over (the product of
    their norms + 1e-8). In a batch of one, columns do not vary: their part is constant. Logits (B,
    K) on both sides.
    """

    name = "dist"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        beta: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the correlation over the classes of each sample.",
        )
        gamma: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the correlation over the samples, for each class.",
        )
        temperature: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            description="tau: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        tau = self.options.temperature
        p, q = (student.logits / tau).softmax(1), (teacher.logits / tau).softmax(1)
        # in a batch of one, columns do not vary: the second part is a constant
        inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
        return tau**2 * (self.options.beta * inter + self.options.gamma * intra)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [DIST]
