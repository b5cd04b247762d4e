"""SVD distillation: what the main directions of one layer's channels have to do with those of
the next, as the teacher has it.

Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition", ECCV
2018, arXiv:1807.06819, section 3 (the feature vectors and their kernel, without the training
scheme); constants and the sum over elements as in a public benchmark's port. Singular vectors have
no sign: the teacher's are turned so that their entries do not sum to less than 0, where the port
takes the library's arbitrary choice, and the student's towards the teacher's. Widths must agree
there; a 1x1 convolution adapts the student's here.

Vectors come from the Gram matrix of the smaller side in double precision. A slope divides by the
gap between singular values: where that is below 1e-5 (times the largest value, if above 1) the
rotation of the two into each other has no slope, and a vector of so small a value counts as zero;
the port overwrites infinite values, after the fact. It relates layers of one image, so processes
need no gathering.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kdkit

# how many more of the student's vectors than of the teacher's are looked through for the most alike
SPARE = 3


class SingularVectors(kdkit.Loss):
    """Squared difference between kernels of consecutive layers' singular vectors.

    Formula: (K(v_s, w_s) - K(v_t, w_t))^2, K_cdj(v, w) = exp(-(v_cj - w_dj)^2 / 8), summed over the
    channels c of a layer, d of the layer before it and the k vectors j, mean over the batch, then
    over the consecutive layers

    v and w are the first k right singular vectors of a layer's features as (H * W, C) and of the
    layer's before it, times the teacher's singular values at unit length; the student's are those
    of its first k + 3 that are most alike the teacher's, turned to their side. Maps (B, C, H, W) of
    any sizes, or tokens of a square grid, in at least two layers, shallow to deep; a 1x1
    convolution brings the student's channels to the teacher's where they differ. k is at most what
    the smallest map has positions or channels.
    """

    name = "kdsvd"
    knowledge = "relation"
    exceptions = {
        "check_stays_in_its_type": (
            "small singular values need fp64; where there is none, fp32 on the processor"
        ),
    }

    class Options(kdkit.MapOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            min_length=2, description="Student/teacher layer pairs, shallow to deep."
        )
        k: int = Field(
            default=1,
            ge=1,
            le=16,
            description="How many singular vectors of each layer; the paper also takes 4.",
        )

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList(
            kdkit.aligned(f_s, f_t) for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        maps = zip(self.adapters, self.options.pairs(student, teacher), strict=True)
        pairs = [(adapter(f_s), f_t) for adapter, (f_s, f_t) in maps]
        # one k for all layers: the kernel relates vectors of two layers one by one
        k = min(self.options.k, *(rank(f) for pair in pairs for f in pair))
        layers = []
        for f_s, f_t in pairs:
            v_t, values = singular_vectors(f_t, k)
            v_t = v_t * signs(v_t.sum(1, keepdim=True))
            v_s = most_alike(singular_vectors(f_s, min(k + SPARE, rank(f_s)))[0], v_t)
            layers.append([v * F.normalize(values, dim=1)[:, None] for v in (v_s, v_t)])
        errors = [
            kernel(v_s, w_s) - kernel(v_t, w_t)
            for (w_s, w_t), (v_s, v_t) in itertools.pairwise(layers)
        ]
        return torch.stack([error.square().sum() / len(error) for error in errors]).mean()


def rank(f: Tensor) -> int:
    """Most directions that maps (B, C, H, W) can have."""
    return min(f.shape[1], f.shape[2] * f.shape[3])


def signs(x: Tensor) -> Tensor:
    # not torch.sign, which would make a vector of sign 0 vanish
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def most_alike(v_s: Tensor, v_t: Tensor) -> Tensor:
    """For each of the teacher's vectors (B, C, k), that one of the student's (B, C, n) with the
    largest absolute cosine, towards it.
    """
    # which vector is taken, and its sign, have no slope
    cosine = v_s.detach().mT @ v_t
    best = cosine.abs().argmax(1, keepdim=True)
    return v_s.gather(2, best.expand_as(v_t)) * signs(cosine.gather(1, best))


def kernel(v: Tensor, w: Tensor) -> Tensor:
    """Vectors (B, C, k) and (B, D, k) to (B, C, D, k)."""
    return torch.exp((v[:, :, None] - w[:, None]).square() / -8)


def singular_vectors(f: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors (B, C, count) of maps (B, C, H, W) as (H * W, C), and
    their singular values (B, count).
    """
    # Apple's GPUs have no doubles
    x = (f.cpu() if f.device.type == "mps" else f).double().flatten(2)
    flat = x.shape[1] <= x.shape[2]
    values, vectors = FirstEigenvectors.apply(x @ x.mT if flat else x.mT @ x, count)
    silent = values <= least_gap(values)
    # a value of nothing but rounding has no direction
    vectors = vectors.masked_fill(silent[:, None], 0.0)
    # normalised, not divided by the singular values, which may be 0
    return (vectors if flat else F.normalize(x @ vectors, dim=1)).to(f), values.masked_fill(
        silent, 0.0
    ).to(f)


def least_gap(values: Tensor) -> Tensor:
    """Differences of singular values (B, n) up to this (B, 1) count as none."""
    return 1e-5 * values.amax(1, keepdim=True).clamp_min(1.0)


class FirstEigenvectors(torch.autograd.Function):
    """Gram matrices (B, n, n) to square roots of the largest eigenvalues (B, count), a constant,
    and their vectors (B, n, count).
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
        squares, vectors = torch.linalg.eigh(gram)
        # `eigh` gives the smallest first, and by rounding some below 0
        values, vectors = squares.flip(1).clamp_min(0.0).sqrt(), vectors.flip(2)
        ctx.save_for_backward(values, vectors)
        first = values[:, :count]
        ctx.mark_non_differentiable(first)
        return first, vectors[..., :count].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        first = values[:, None, : grad.shape[2]]
        # their product is the difference of eigenvalues, which are the squares
        gap, total = first - values[..., None], first + values[..., None]
        apart = gap.abs() > least_gap(values)[..., None]
        # 1 in the divisor of what is not taken: 0 / 0 would be NaN
        turn = torch.where(apart, vectors.mT @ grad / torch.where(apart, gap * total, 1.0), 0.0)
        return vectors @ turn @ vectors[..., : grad.shape[2]].mT, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SingularVectors]
