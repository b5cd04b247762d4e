"""Neuron selectivity transfer: the student's channels look at the same places as the teacher's,
as two sets of patterns.

Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
arXiv:1707.01219, section 4, with the polynomial kernel (d = 2, c = 0) that the paper finds best.
The term of the teacher alone is a constant; it is kept, so that the value is a distance: 0 for
equal sets. Where sizes differ, the paper interpolates; here the larger map is average-pooled, as in
public benchmarks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class NeuronSelectivity(kdkit.Loss):
    """Squared maximum mean discrepancy (MMD) between the two models' sets of spatial patterns,
    one a channel.

    Formula: mean_ij (x_i . x_j)^2 + mean_ij (y_i . y_j)^2 - 2 mean_ij (x_i . y_j)^2, mean over the
    batch, then over the layer pairs

    x_i are the student's channels as vectors over the positions, divided by their L2 norm; y_i the
    teacher's. Maps (B, C, H, W) with any number of channels, or tokens of a square grid; the larger
    map is average-pooled to the smaller. A silent channel has no pattern, x_i = 0; channels whose
    norm is below 1e-5 shrink to that.
    """

    name = "nst"
    knowledge = "feature"
    Options = kdkit.MapOptions
    options: kdkit.MapOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        discrepancies = []
        for f_s, f_t in self.options.pairs(student, teacher):
            # torch's own 1e-12 would let the gradient of a silent channel grow to 1e12
            x, y = (
                F.normalize(f.flatten(2), dim=2, eps=1e-5) for f in kdkit.pooled_alike(f_s, f_t)
            )
            # products between positions are fewer than those between channels
            if x.shape[2] < max(x.shape[1], y.shape[1]):
                discrepancies.append((likeness(x) - likeness(y)).square().sum((1, 2)).mean())
            else:
                discrepancies.append(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
        return torch.stack(discrepancies).mean()


def likeness(x: Tensor) -> Tensor:
    """Products between the positions of (B, C, D), (B, D, D), mean over the channels; their
    inner products are the kernel's means.
    """
    return x.mT @ x / x.shape[1]


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean of (x_i . y_j)^2 over the pairs of rows of (B, C, D) and (B, E, D), and over the
    batch.
    """
    return (x @ y.mT).square().mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [NeuronSelectivity]
