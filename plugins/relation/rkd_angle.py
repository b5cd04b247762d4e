"""Relational distillation, angles: the student keeps the teacher's angles within every triplet
of samples.

Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, eq. 8 to 10;
reductions as in the released code (mean over all N^3 ordered triplets, degenerate ones included as
0).

That code builds all N^2 differences of D numbers; its gradient is near 1e9 where two rows are
equal. With the Gram matrix G of centred features, the cosine at vertex i is (G_jk - G_ij - G_ik +
G_ii) / (d_ij d_ik), which needs no D, and a vertex at a time is enough: memory is O(N^2 * chunk).
The gradient is a combination of the rows, K @ f with K (N, N), so it is summed in the same sweep,
by hand. G loses digits that differences keep; double precision, cheap here, gives them back. Sides
shorter than 1e-6 count as degenerate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import kdkit


class RelationalAngle(kdkit.Loss):
    """Huber difference between the cosines of the angles that the two models see in every
    triplet.

    Formula: smooth_l1(cos_ijk(f_s), cos_ijk(f_t)), mean over all N^3 triplets, then over the layer
    pairs

    cos_ijk is the cosine of the angle at f_i between f_j - f_i and f_k - f_i, 0 where one of them
    is 0; smooth_l1 is quadratic below 1. Embeddings (B, D), larger features flattened to that; the
    two models' sizes need not agree. Equal rows have no gradient; a batch of one gives 0.
    """

    name = "rkd_angle"
    knowledge = "relation"
    exceptions = {
        "check_stays_in_its_type": (
            "a Gram matrix loses digits that fp64 gives back; Apple's GPUs take fp32"
        ),
    }
    Options = kdkit.RelationOptions
    options: kdkit.RelationOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values: list[Tensor] = [
            AngleDifference.apply(*pair) for pair in self.options.pairs(student, teacher)
        ]
        return torch.stack(values).mean()


class AngleDifference(torch.autograd.Function):
    """Embeddings (N, D_s) and (N, D_t) to the loss; the second gets no gradient."""

    @staticmethod
    def forward(ctx: Any, e_s: Tensor, e_t: Tensor) -> Tensor:
        student = Triplets(e_s)
        teacher = Triplets(e_t)
        n = len(e_s)
        # fits a processor's cache; keeps a GPU busy
        chunk = max(1, (2**18 if e_s.device.type == "cpu" else 2**23) // n**2)
        value, ends = student.gram.new_zeros(()), torch.zeros_like(student.gram)
        vertex, length = torch.zeros_like(ends), torch.zeros_like(ends)
        for rows in (slice(start, start + chunk) for start in range(0, n, chunk)):
            cosines, wanted = student.cosines(rows), teacher.cosines(rows)
            value += F.smooth_l1_loss(cosines, wanted, reduction="sum")
            # the slope of smooth_l1, which is linear beyond 1
            slope = (cosines - wanted).clamp_(-1, 1)
            # turning a side keeps its length: this part of the slope is taken out
            length[rows] = (slope * cosines).sum(2)
            slope *= student.scale(rows)
            ends += slope.sum(0)
            vertex[rows] = slope.sum(2)
        length *= student.inverse**2
        # d(value)/d(f_j - f_i) is 2 * sum_k slope_ijk (f_k - f_i) - 2 * length_ij (f_j - f_i);
        # collected for each row of f:
        k = (
            ends
            - vertex
            - vertex.T
            + length
            + length.T
            + torch.diag(vertex.sum(1) - length.sum(1) - length.sum(0))
        )
        ctx.save_for_backward((2 / n**3 * (k @ student.rows)).to(e_s.dtype))
        return (value / n**3).to(e_s.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


class Triplets:
    """Centred rows (N, D), their Gram matrix (N, N) and inverse distances (N, N), 0 for sides
    that count as degenerate.
    """

    def __init__(self, embeddings: Tensor) -> None:
        # Apple's GPUs have no doubles
        wide = torch.float32 if embeddings.device.type == "mps" else torch.float64
        rows = embeddings.to(wide)
        self.rows = rows - rows.mean(0)
        self.gram = self.rows @ self.rows.T
        square = self.gram.diagonal()
        both = square[:, None] + square
        squared_distance = both - 2 * self.gram
        # relative to the norms, as the rounding of a Gram matrix is
        floor = max(1e-12, 32 * torch.finfo(wide).eps) * both.clamp_min(1.0)
        self.inverse = torch.where(
            squared_distance > floor, squared_distance.clamp_min(1e-12).rsqrt(), 0.0
        )

    def scale(self, rows: slice) -> Tensor:
        """1 / (d_ij d_ik) for the vertices i of a chunk, (chunk, N, N)."""
        return self.inverse[rows, :, None] * self.inverse[rows, None, :]

    def cosines(self, rows: slice) -> Tensor:
        """cos_ijk for the vertices i of a chunk, (chunk, N, N)."""
        dots = self.gram - self.gram[rows, :, None]
        dots -= (self.gram[rows] - self.gram.diagonal()[rows, None])[:, None]
        return dots.mul_(self.scale(rows))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [RelationalAngle]
