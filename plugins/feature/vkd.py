"""Orthogonal projection: the student's embedding, turned but not bent, must be the teacher's
normalised one.

Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024,
arXiv:2403.06213, sections 3.2 and 3.3. The paper's weight is 1, beside the cross-entropy and, for
vision transformers, a divergence of logits of weight 1 at temperature 1 on a distillation token.
It parametrises the projection by a matrix exponential, the released code by torch's default; here
it is a Cayley transform, which reaches the same projections and needs one linear system and no
look at numbers. `whiten` is what the paper takes for generating images; it whitens each process's
own samples.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

EPS = 1e-3  # of the mean variance: directions of less are not enlarged to 1
STEPS = 24  # until the inverse root of a condition of 2,048 / EPS has settled


class OrthogonalProjection(kdkit.Loss):
    """Smooth L1 distance of the teacher's normalised vectors from an orthogonal projection of the
    student's.

    Formula: smooth_l1(P v_s - N(v_t)), smooth_l1(d) = d^2 / (2 beta) where |d| < beta, else
    |d| - beta / 2; mean over the batch and the teacher's channels, then over the layer pairs

    P is learnt, without bias, and orthogonal: P'P = 1, or PP' = 1 where the student is wider. N is
    layer normalisation without scale and shift, or, with `normalise: whiten`, subtracts the batch's
    mean and multiplies by the inverse root of the batch's covariance (plus 0.001 of the mean
    variance); a single sample then teaches nothing. Vectors (B, D); maps are averaged over their
    positions, tokens over the sequence.
    """

    name = "vkd"
    knowledge = "feature"

    class Options(kdkit.VectorOptions):
        normalise: Literal["layer_norm", "whiten"] = Field(
            default="layer_norm",
            description=(
                "What is done to the teacher's vectors: `layer_norm`, each for itself; or `whiten`,"
                " uncorrelated channels over the batch."
            ),
        )
        beta: float = Field(
            default=1.0, gt=0, le=100, description="Below it a difference counts squared."
        )

    options: Options
    projections: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.projections = nn.ModuleList(
            Orthogonal(v_s.shape[1], v_t.shape[1])
            for v_s, v_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        distances = []
        for project, (v_s, v_t) in zip(
            self.projections, self.options.pairs(student, teacher), strict=True
        ):
            whitens = self.options.normalise == "whiten"
            target = whitened(v_t) if whitens else F.layer_norm(v_t, v_t.shape[1:])
            distance = F.smooth_l1_loss(project(v_s), target, beta=self.options.beta)
            # one sample has no covariance: its target would be 0, whatever it is
            distances.append(0 * distance if whitens and len(v_t) == 1 else distance)
        return torch.stack(distances).mean()


class Orthogonal(nn.Module):
    """A linear map whose matrix has orthonormal columns, or rows where it narrows.

    The matrix is `start` times the Cayley transform of a skew-symmetric matrix, the learnt one,
    which begins at zero. It is skew in the columns that count: as many numbers are free as an
    orthogonal map has.
    """

    start: Tensor

    def __init__(self, width: int, wanted: int) -> None:
        super().__init__()
        wide, narrow = max(width, wanted), min(width, wanted)
        self.widens = wanted >= width
        self.skew = nn.Parameter(torch.zeros(wide, narrow))
        self.register_buffer("start", nn.init.orthogonal_(torch.empty(wide, wide)))

    def forward(self, v: Tensor) -> Tensor:
        return F.linear(v, self.weight())

    def weight(self) -> Tensor:
        """Return the matrix (wanted, width)."""
        wide, narrow = self.skew.shape
        lower = F.pad(self.skew.tril(-1), (0, wide - narrow))
        skew = lower - lower.T
        one = torch.eye(wide, dtype=skew.dtype, device=skew.device)
        # 1 + skew is never singular; `solve` would ask whether it is, and wait for the device
        turned: Tensor = torch.linalg.solve_ex(one + skew, (one - skew)[:, :narrow])[0]
        matrix = self.start @ turned
        return matrix if self.widens else matrix.T


def whitened(v: Tensor) -> Tensor:
    """Vectors (B, D) with mean 0 and, as far as their number allows, covariance 1."""
    centred = v - v.mean(0)
    # clamped so that constant vectors stay 0
    scale = centred.square().mean().clamp_min(1e-14)
    centred = centred * scale.rsqrt()
    count, width = centred.shape
    if count < width:  # the same from the smaller side: the two matrices share their eigenvalues
        return inverse_root(centred @ centred.T / count, width) @ centred
    return centred @ inverse_root(centred.T @ centred / count, width)


def inverse_root(matrix: Tensor, trace: float) -> Tensor:
    """(matrix + EPS)^(-1/2) of a symmetric matrix without negative eigenvalues, of this trace at
    most, by Newton's coupled iteration.

    Of products alone: a decomposition of eigenvalues would wait for the device.
    """
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    size = trace + EPS
    root = (matrix + EPS * one) / size
    inverse: Tensor = one
    for _ in range(STEPS):
        step = 1.5 * one - 0.5 * inverse @ root
        root = root @ step
        inverse = step @ inverse
    return inverse / math.sqrt(size)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [OrthogonalProjection]
