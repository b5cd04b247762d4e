"""Variational information distillation: a learnt Gaussian says how likely the teacher's features
are, given the student's.

Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
arXiv:1904.05835, section 2: minus a lower bound on the mutual information of the two, but for
constants. Regressor, initial and least variance and the reduction (mean, not sum) as in the
authors' code; where sizes differ, the larger map is average-pooled.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

LEAST_VARIANCE = 1e-5


class VariationalInformation(kdkit.Loss):
    """Negative log-likelihood of the teacher's features under a Gaussian whose mean comes from
    the student's.

    Formula: ((mu(f_s) - f_t)^2 / var_c + log var_c) / 2, mean over all elements, then over the
    layer pairs, in nats

    mu is three 1x1 convolutions without bias, as wide as the teacher, with ReLU between them; var_c
    = softplus(a_c) + 1e-5 is learnt for each of the teacher's channels. Maps (B, C, H, W), or
    tokens of a square grid; the larger one is average-pooled to the smaller. The value falls below
    0 as the guess gets better.
    """

    name = "vid"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        initial_variance: float = Field(
            default=5.0, ge=1e-3, le=1e4, description="Variance of every channel before training."
        )

    options: Options
    regressors: nn.ModuleList
    scales: nn.ParameterList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.regressors, self.scales = nn.ModuleList(), nn.ParameterList()
        above = self.options.initial_variance - LEAST_VARIANCE
        # not log(expm1(above)), which overflows from 710 on
        start = above + math.log(-math.expm1(-above))  # softplus of it is `above`
        for f_s, f_t in self.options.pairs(student, teacher):
            c_s, c_t = f_s.shape[1], f_t.shape[1]
            widths = ((c_s, c_t), (c_t, c_t), (c_t, c_t))
            first, second, third = (
                nn.Conv2d(before, after, 1, bias=False) for before, after in widths
            )
            self.regressors.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            # of a channel, as in the authors' code: a variance of each position would fit one size
            # only
            self.scales.append(nn.Parameter(torch.full((c_t, 1, 1), start)))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        surprises = []
        for regressor, scale, (f_s, f_t) in zip(
            self.regressors, self.scales, self.options.pairs(student, teacher), strict=True
        ):
            f_s, f_t = kdkit.pooled_alike(f_s, f_t)
            # added, not clamped: a clamped variance would have no gradient to grow again
            variance = F.softplus(scale) + LEAST_VARIANCE
            surprises.append(
                ((regressor(f_s) - f_t).square() / variance + variance.log()).mean() / 2
            )
        return torch.stack(surprises).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [VariationalInformation]
