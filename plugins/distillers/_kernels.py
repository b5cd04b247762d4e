"""Kernel ridge regression with the neural tangent kernel of an infinitely wide network.

Jacot, Gabriel, Hongler, NeurIPS 2018, arXiv:1806.07572; of ReLU layers in closed form by the
arc-cosine kernels of Cho, Saul, NeurIPS 2009. With v_w and v_b the variances of weights and biases
of a layer in the NTK parameterisation, D the number of inputs, and for each hidden layer, with
c = S(x, x') / sqrt(S(x, x) S(x', x')) and t = arccos c:

    S_0 = v_w x . x' / D + v_b,  N_0 = S_0
    S_1 = v_w sqrt(S_0(x, x) S_0(x', x')) (sin t + (pi - t) c) / (2 pi) + v_b
    N_1 = S_1 + v_w N_0 (pi - t) / (2 pi)

All in fp64, solved by Cholesky: the matrices are ill-conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

import kdkit

NEAREST = 1e-12
"""How near cosines come to 1 and -1, where the angle has no finite slope; nothing is lost, as there
the kernel does not depend on the angle."""

ROWS = 2000
"""Images whose kernel is in memory at once."""

Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelOptions(kdkit.DataDistillerOptions):
    """Options of a method that is a kernel ridge regression."""

    layers: int = Field(
        default=1, ge=1, le=100, description="Hidden layers of the network that the kernel is of."
    )
    regularization: float = Field(
        default=1e-6, gt=0, description="Ridge, in units of the mean of the kernel's diagonal."
    )


def ntk(layers: int, weights: float = 2.0, biases: float = 0.01) -> Kernel:
    """Return the neural tangent kernel of a fully connected ReLU network; `weights` and `biases`
    are variances: W_std = sqrt 2, b_std = 0.1, as in the KIP paper.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        """Kernel of the rows of (N, D) and (M, D), (N, M)."""
        s: Tensor = weights * x @ y.T / x.shape[1] + biases
        n: Tensor = s
        s_x, s_y = (weights * z.square().sum(1) / z.shape[1] + biases for z in (x, y))
        for _ in range(layers):
            lengths = (s_x[:, None] * s_y[None]).sqrt()
            cosine = (s / lengths).clamp(NEAREST - 1, 1 - NEAREST)
            angle = cosine.arccos()
            s = weights * lengths * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
            s = s + biases
            n = s + weights * n * (math.pi - angle) / (2 * math.pi)
            # E[relu(u)^2] is half the variance of u
            s_x, s_y = (weights * z / 2 + biases for z in (s_x, s_y))
        return n

    return kernel


def factor(k: Tensor, regularization: float) -> Tensor:
    """Cholesky factor of a kernel matrix (M, M) with its ridge.

    Raises:
        DataError: it is singular.
    """
    ridge = regularization * k.diagonal().mean()
    found: Tensor
    found, failed = torch.linalg.cholesky_ex(k + ridge * torch.eye(len(k)).to(k))
    if int(failed):
        raise kdkit.DataError(
            "the kernel of the images is singular: raise `regularization`, or take fewer images"
        )
    return found


class Standardised:
    """Images as a kernel sees them: rows (N, D) in fp64, of mean 0 and deviation 1 in all."""

    def __init__(self, images: Tensor) -> None:
        sample = images[:: max(1, len(images) // 10_000)].double() / 255
        self.mean, self.std = sample.mean(), sample.std().clamp_min(1e-6)
        self.low, self.high = ((end - self.mean) / self.std for end in (0.0, 1.0))

    def rows(self, images: Tensor) -> Tensor:
        """Standardise images uint8 (N, C, H, W)."""
        return ((images.double() / 255 - self.mean) / self.std).flatten(1)

    def images(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return images in [0, 1], (N, *shape)."""
        return (rows * self.std + self.mean).clamp(0, 1).reshape(len(rows), *shape)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) as (N, K) of mean 0: the class has 1 - 1/K, others -1/K."""
    found: Tensor = torch.nn.functional.one_hot(labels, classes).double() - 1 / classes
    return found


def accuracy(
    kernel: Kernel, support: Tensor, targets: Tensor, ridge: float, test: Tensor, labels: Tensor
) -> float:
    """Accuracy of the regression from `support` (M, D) with `targets` (M, K) on test rows, %."""
    solved = torch.cholesky_solve(targets, factor(kernel(support, support), ridge))
    guesses = [(kernel(rows, support) @ solved).argmax(1) for rows in torch.split(test, ROWS)]
    return 100 * (torch.cat(guesses) == labels).double().mean().item()
