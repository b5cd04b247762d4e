"""Correlation congruence: samples of a batch correlate for the student as they do for the
teacher, under a Gaussian kernel.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv:1904.01802,
section 3: the kernel is a Taylor series in the inner product of normalised embeddings, order 2 and
gamma 0.4. Only N x N matrices are compared, so that no embedding layer is needed where the models'
widths differ, and there is none here. A public benchmark's loss of the same name multiplies the
differences of succeeding samples after learnt embeddings of both models instead, so that its weight
of 0.02 says little here. A row with a norm below 1e-6 has correlation 0 to all and no gradient.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class CorrelationCongruence(kdkit.Loss):
    """Mean squared difference between the two models' matrices of correlations within the batch.

    Formula: (k(f_s) - k(f_t))^2 with k_ij(f) = sum_p exp(-2 gamma) (2 gamma)^p / p! * cos(f_i,
    f_j)^p, p = 0 to order, mean over all N^2 pairs, then over the layer pairs

    With all orders, k_ij is the Gaussian kernel exp(-gamma |x_i - x_j|^2) of the embeddings x at
    unit length. Embeddings (B, D), larger features flattened to that; the two models' sizes need
    not agree. A batch of one gives 0.
    """

    name = "cc"
    knowledge = "relation"

    class Options(kdkit.RelationOptions):
        gamma: kdkit.Rampable = Field(
            default=0.4, gt=0, le=10, description="Sharpness of the Gaussian kernel."
        )
        order: int = Field(
            default=2,
            ge=1,
            le=16,
            description="Highest power of the cosine in the kernel's Taylor series.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = self.options.pairs(student, teacher)
        return torch.stack(
            [F.mse_loss(self.correlation(e_s), self.correlation(e_t)) for e_s, e_t in pairs]
        ).mean()

    def correlation(self, e: Tensor) -> Tensor:
        """Embeddings (N, D) to the kernel of each pair, (N, N)."""
        silent = e.detach().norm(dim=1, keepdim=True) < 1e-6
        # a single sample correlates with nothing
        # before the division: a quotient by a norm near 0 would have a huge gradient
        unit = F.normalize(e.masked_fill(silent | (len(e) < 2), 0.0))
        cosine = unit @ unit.T
        width = 2 * self.options.gamma
        order = self.options.order
        kernel = torch.ones_like(cosine)
        for p in range(order, 0, -1):  # Horner's scheme, from the highest power
            kernel = 1 + width / p * cosine * kernel
        # the factor that all terms have in common
        return math.exp(-width) * kernel


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CorrelationCongruence]
