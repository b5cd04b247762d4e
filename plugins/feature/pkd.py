"""Pearson distillation: the student's channels go up and down where the teacher's do, at a scale
of their own.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022, arXiv:2207.02039, section 3. Half the mean squared difference of
standardised values is about 1 - Pearson's correlation. As in the released code, but that a channel
of constant values, whose gradient is NaN there, has none here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkit

from ._standardised import standardised


class Pearson(kdkit.Loss):
    """Half the mean squared difference of features that are standardised channel by channel.

    Formula: (n(r(f_s)) - n(f_t))^2 / 2 with n(f) = (f - mean) / (std + 1e-6), mean over all
    elements, then over the layer pairs

    Mean and (unbiased) standard deviation are a channel's over the batch and the positions. Maps
    (B, C, H, W), or tokens of a square grid. r is a 1x1 convolution where the channels differ (no
    bias: the mean goes away), and a bilinear resize to the teacher's size where that differs. One
    image with one position gives 0.
    """

    name = "pkd"
    knowledge = "feature"
    Options = kdkit.MapOptions
    options: kdkit.MapOptions
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            # no bias: it would go away with the mean
            self.adapters.append(kdkit.aligned(f_s, f_t, bias=False))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for adapter, (f_s, f_t) in zip(
            self.adapters, self.options.pairs(student, teacher), strict=True
        ):
            f_s = kdkit.resized(adapter(f_s), f_t.shape[2:])
            errors.append(F.mse_loss(standardised(f_s), standardised(f_t)) / 2)
        return torch.stack(errors).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Pearson]
