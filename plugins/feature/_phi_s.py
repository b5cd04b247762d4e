"""PHI-S: standardises a teacher's features by one scale for all dimensions, after a rotation that
gives each of them the same variance.

Ranzinger, Barker, Heinrich, Molchanov, Catanzaro, Tao, "PHI-S: Distribution Balancing for
Label-Free Multi-Teacher Distillation", arXiv:2410.01680. The released code builds Hadamard matrices
in single precision, where its own check fails for some sizes; here all of it is in double
precision. Where no Hadamard matrix of a size is known here, a random rotation comes close.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kdkit

from ._tokens import real_tokens

SMALLEST = 1e-24  # mean variance of features that do not vary


class PhiS(nn.Module):
    """x -> H U' (x - mean) / sqrt(mean eigenvalue), for x (..., D).

    U has the eigenvectors of the covariance, H is a Hadamard matrix divided by sqrt(D): each
    dimension of the result has variance 1. Distances are those of x, but for one factor.

    Args:
        count: number of vectors (1,) that mean and covariance are of.
        total: their sum, (D,).
        products: the sum of x x', (D, D).
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, count: Tensor, total: Tensor, products: Tensor) -> None:
        super().__init__()
        mean = total.double() / count
        covariance = products.double() / count - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(covariance)
        # the sign of an eigenvector is the library's choice, and a student has learnt one of them
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        scale = values.clamp_min(0).mean().clamp_min(SMALLEST).sqrt()
        # not persistent: they follow from the frozen teacher, and a later stage may have another
        self.register_buffer("mean", mean, persistent=False)
        matrix = rotation(len(mean)) @ (vectors * largest.sign()).T / scale
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) @ self.matrix.to(x).T


def moments(answers: kdkit.Answers, maps: Sequence[bool]) -> dict[str, Tensor]:
    """Return what `PhiS` is made of, for each layer: count, sum and sum of products, by position.

    Args:
        answers: of the teacher.
        maps: for each layer, whether tokens are read as a map, which has no class token.
    """
    found = dict[str, Tensor]()
    for outputs, _ in answers:
        for (layer, f), as_map in zip(outputs.features.items(), maps, strict=True):
            x = vectors_of(kdkit.as_map(f) if as_map else f, outputs.mask).double()
            sums = {"count": x.new_full((1,), len(x)), "total": x.sum(0), "products": x.T @ x}
            for name, value in sums.items():
                found[f"{layer} {name}"] = found.get(f"{layer} {name}", 0) + value
    return found


def of_layer(found: dict[str, Tensor], layer: str) -> PhiS:
    """Return the standardisation of one layer, of what `moments` gives."""
    return PhiS(*(found[f"{layer} {name}"] for name in ("count", "total", "products")))


def vectors_of(f: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors of all positions, real tokens or samples, (N, D)."""
    if f.ndim == 3:
        return f[real_tokens(f, mask)]
    return f.movedim(1, -1).flatten(0, -2)


def rotation(size: int) -> Tensor:
    """Return an orthogonal matrix whose entries are of equal size, or nearly so."""
    if (found := hadamard(size)) is not None:
        return found.div(size**0.5)
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    orthogonal, triangle = torch.linalg.qr(drawn.sign().double())
    rotated: Tensor = orthogonal * triangle.diagonal().sign()
    return rotated


def hadamard(size: int) -> Tensor | None:
    """Return a matrix of 1 and -1 with orthogonal rows: Sylvester's doubling of one by Paley."""
    part = size
    while part > 2 and not is_paley(part) and part % 2 == 0:
        part //= 2
    if part > 2 and not is_paley(part):
        return None
    found = paley(part) if part > 2 else torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    return found


def is_paley(size: int) -> bool:
    """Whether `size` is 1 more than a prime that leaves 3 when divided by 4."""
    prime = size - 1
    return prime % 4 == 3 and all(prime % d for d in range(2, int(prime**0.5) + 1))


def paley(size: int) -> Tensor:
    """Return Paley's matrix, of the squares modulo the prime `size` - 1."""
    prime = size - 1
    numbers = torch.arange(prime)
    is_square = torch.zeros(prime, dtype=torch.bool)
    is_square[numbers[1:] ** 2 % prime] = True
    signs = torch.where(is_square, 1.0, -1.0).double()
    signs[0] = 0
    found = torch.ones(size, size, dtype=torch.float64)
    found[1:, 0] = -1
    found[1:, 1:] = signs[(numbers[:, None] - numbers) % prime] + torch.eye(prime)
    return found
