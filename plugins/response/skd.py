"""Streamlined distillation (SKD): predictions agree sample by sample, and the directions of the
logit vectors relate to each other as the teacher's do.

Jeong et al., "Streamlined Knowledge Distillation", CVPR 2026,
https://cvpr.thecvf.com/virtual/2026/poster/39253: instance and direction knowledge, whose sum the
formula is.

The released code has the factor T^2 in the first part, divides the cosines by K, which is the same
as K^2 times the regularization, and multiplies the parts by the shares of samples and of classes of
which the teacher is not surer than of the median one, about a half. With 0.5 of that and 0.5 of the
cross-entropy, for K = 100 it is

    - {use: skd, weight: 0.5, instance: 8, direction: 0.5, regularization: 1000}

A batch of one raises there, and equal answers give NaN gradients.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class Streamlined(kdkit.Loss):
    """KL divergence of the softened predictions, and Mahalanobis distance between the two models'
    cosines of logit vectors within the batch.

    Formula: instance * KL(softmax(z_t / T) || softmax(z_s / T)) + direction * sqrt(d_n S^-1 d_n^T),
    mean over the batch

    d_n is row n of D = G_s - G_t, with G the cosines (N, N) of the logit vectors of N samples; S is
    the covariance of the columns of D over its rows (divided by N - 1) plus `regularization` times
    the identity, and the gradient passes through it. The divergence is in nats, without a factor
    T^2. The second part is 0 for a batch of one. Takes N^2 numbers for each of a few copies. Logits
    (N, K) on both sides.
    """

    name = "skd"
    knowledge = "response"
    # it compares all rows of a batch with one another
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_averages_over_the_batch": (
            "a distance in N dimensions, whitened by a covariance of N samples, as in the paper"
        ),
    }

    class Options(kdkit.ResponseOptions):
        instance: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the KL divergence of each sample's prediction.",
        )
        direction: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the distance between the cosines."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens the predictions, not the cosines."
        )
        regularization: float = Field(
            default=0.1,
            ge=0.01,
            description="Added to all variances: the larger, the more alike all directions count.",
        )
        gather: bool = Field(
            default=False,
            description="Relate the samples of all processes, not of each process alone.",
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o = self.options
        z_s, z_t = student.logits, teacher.logits
        if o.gather:
            z_s, z_t = kdkit.gather(z_s), kdkit.gather(z_t)
        log_p = F.log_softmax(z_s / o.temperature, dim=1)
        log_q = F.log_softmax(z_t / o.temperature, dim=1)
        divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        distances = whitened_lengths(cosines(z_s) - cosines(z_t), o.regularization)
        # a single vector has no direction to relate to: the cosine with itself
        direction = distances.mean() if len(z_s) > 1 else 0.0 * distances.sum()
        return o.instance * divergence + o.direction * direction


def cosines(z: Tensor) -> Tensor:
    """Of all pairs of rows, (N, N)."""
    # 1e-4 bounds the gradient of a row near 0, where torch's own 1e-12 does not
    unit = F.normalize(z, eps=1e-4)
    return unit @ unit.T


def whitened_lengths(d: Tensor, regularization: float) -> Tensor:
    """Lengths (N,) of the rows of d (N, N) where its columns, over the rows, have covariance 1."""
    centred = d - d.mean(0)
    covariance = centred.T @ centred / max(len(d) - 1, 1)
    covariance = covariance + regularization * torch.eye(len(d), dtype=d.dtype, device=d.device)
    # without a check of errors, for which the host would wait: it is positive definite
    lower, _ = torch.linalg.cholesky_ex(covariance)
    squares: Tensor = torch.linalg.solve_triangular(lower, d.T, upper=False).square().sum(0)
    # clamp before the root: its slope at 0 is infinite
    return squares.clamp_min(1e-12).sqrt()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Streamlined]
