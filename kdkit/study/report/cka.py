"""Similarity of two networks' layers: linear centred kernel alignment (CKA).

Kornblith et al., "Similarity of neural network representations revisited" (ICML 2019, arXiv
1905.00414), over batches as Nguyen et al. (ICLR 2021, arXiv 2010.15327, eq. 3) do it: sums of each
batch's unbiased HSIC, so that neither small batches nor wide layers raise the value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEAST = 4  # samples for which the unbiased HSIC is defined


class LayerSimilarity:
    """Linear CKA of every layer of one network with every layer of another, batch by batch.

    Args:
        rows, columns: names of the layers of the first and the second network.
    """

    def __init__(self, rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
        self.rows, self.columns = rows, columns
        self.samples = 0
        self._across = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        self._own = (
            torch.zeros(len(rows), dtype=torch.float64),
            torch.zeros(len(columns), dtype=torch.float64),
        )

    def add(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """Add features (B, ...) of both networks for the same batch; a batch of fewer than four
        samples adds nothing.
        """
        ours, theirs = (
            [gram(one[name]) for name in self.rows],
            [gram(other[name]) for name in self.columns],
        )
        count = len(ours[0])
        if count < LEAST:
            return
        self.samples += count
        self._own[0].add_(torch.stack([hsic(k, k) for k in ours]))
        self._own[1].add_(torch.stack([hsic(k, k) for k in theirs]))
        self._across += torch.stack(
            [torch.stack([hsic(k, other) for other in theirs]) for k in ours]
        )

    def matrix(self) -> Tensor:
        """Return the CKA (rows, columns), at most 1; about 0 for layers that have nothing in
        common; NaN for a layer with equal features for all samples.
        """
        # A square root of each layer's own sum, not a mean of the batches' values: sums of unbiased
        # estimates stay unbiased.
        return (self._across / (self._own[0][:, None] * self._own[1][None]).sqrt()).cpu()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute the linear CKA of two representations (N, ...) of the same N samples, by the unbiased
    HSIC.

    Raises:
        ValueError: fewer than four samples.
    """
    if len(x) < LEAST:
        raise ValueError(f"CKA needs {LEAST} samples, got {len(x)}")
    similarity = LayerSimilarity(("x",), ("y",))
    similarity.add({"x": x}, {"y": y})
    return float(similarity.matrix())


def gram(features: Tensor) -> Tensor:
    """Compute the scalar products (B, B) of the samples' features (B, ...) about their mean,
    fp64.
    """
    # MPS has no fp64
    flat = (features.cpu() if features.device.type == "mps" else features).flatten(1).double()
    flat = flat - flat.mean(0)  # does not change the unbiased HSIC, but keeps the sums small
    return (flat @ flat.T).cpu()


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Estimate the Hilbert-Schmidt independence criterion of two Gram matrices (B, B), B > 3,
    without bias (Song et al. 2012, eq. 5).
    """
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    product = (
        (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ m.sum(0)
    )
    return product / (n * (n - 3))
