"""Multi-level logit distillation: predictions agree sample by sample, in how samples relate, and
in how classes relate.

Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023, doi:10.1109/CVPR52729.2023.02325, with
the temperatures of the released code. That code shows the models a weakly and a strongly augmented
image, masks what the teacher is unsure of, and takes the mean over all entries of masked
correlations; here one view, no mask, and sums over the entries divided by K and N, its unmasked
form. `standardize`: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
arXiv:2403.01427; rows of equal logits count as uniform and have no gradient.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class MultiLevelKD(kdkit.Loss):
    """KL divergence, and squared differences of class and batch correlations, at several
    temperatures.

    Formula: sum over T of instance * T^2 KL(Q || P) / N + category * sum (Q'Q - P'P)^2 / K + batch
    * sum (QQ' - PP')^2 / N

    P = softmax(z_s / T), Q = softmax(z_t / T), both (N, K), ' is the transpose, N the batch; the
    divergence is in nats. Logits (N, K) on both sides.
    """

    name = "mlkd"
    knowledge = "response"
    # it compares all rows of a batch with one another
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_averages_over_the_batch": (
            "the correlations of samples are a sum over N^2 pairs that is divided by N, as in the"
            " paper"
        ),
    }

    class Options(kdkit.ResponseOptions):
        temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
            default=(2.0, 3.0, 4.0, 5.0, 6.0),
            min_length=1,
            description="Each T at which predictions are compared; the parts are summed.",
        )
        instance: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the KL divergence of each sample's prediction.",
        )
        category: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the correlations between classes."
        )
        batch: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the correlations between samples."
        )
        standardize: bool = Field(
            default=False,
            description="Give every sample's logits mean 0 and deviation 1 first, on both sides.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        o = self.options
        if o.standardize:
            z_s, z_t = kdkit.standardized(z_s), kdkit.standardized(z_t)
        values = []
        for t in o.temperatures:
            log_p, log_q = F.log_softmax(z_s / t, dim=1), F.log_softmax(z_t / t, dim=1)
            # not the other way round: log(softmax) is infinite where a probability rounds to 0
            p, q = log_p.exp(), log_q.exp()
            divergence = t**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
            category, samples = correlation_gaps(p, q)
            values.append(
                o.instance * divergence
                + o.category * category / p.shape[1]
                + o.batch * samples / len(p)
            )
        return torch.stack(values).sum()


def correlation_gaps(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """sum (q'q - p'p)^2 over pairs of classes and sum (qq' - pp')^2 over pairs of samples, for p
    and q (N, K).

    With the mean s of both and the difference d, q'q - p'p = s'd + d's and qq' - pp' = sd' + ds'.
    So products (N, N) are enough for both: a product (K, K) of 21,841 classes would be 1.9 GB.
    """
    s, d = (q + p) / 2, q - p
    sd = s @ d.T
    turned = (sd * sd.T).sum()
    category = 2 * ((s @ s.T) * (d @ d.T)).sum() + 2 * turned
    return category, 2 * sd.square().sum() + 2 * turned


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [MultiLevelKD]
