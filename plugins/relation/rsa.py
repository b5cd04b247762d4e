"""Representational similarity: which samples are unlike is as it is to the teacher.

Kriegeskorte, Mur and Bandettini, "Representational similarity analysis - connecting the branches of
systems neuroscience", Frontiers in Systems Neuroscience 2008, doi:10.3389/neuro.06.004.2008. They
correlate the ranks of dissimilarities; here it is the dissimilarities themselves, whose correlation
has a gradient.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class RepresentationalSimilarity(kdkit.Loss):
    """Lack of correlation between the two models' dissimilarities of samples.

    Formula: 1 - r(D_s, D_t), no unit, mean over the layer pairs; r is Pearson's correlation over
    all pairs of different samples

    D_ij is 1 - cos(e_i, e_j), or the Euclidean distance over the mean of all distances. Embeddings
    (B, D), larger features flattened to that; the two models' sizes need not agree. Dissimilarities
    that hardly vary (an L2 norm of the deviations below 1e-3) correlate less than they do. Fewer
    than three samples give 0.
    """

    name = "rsa"
    knowledge = "relation"

    class Options(kdkit.RelationOptions):
        distance: Literal["cosine", "euclidean"] = Field(
            default="cosine", description="How unlike two samples are."
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        for e_s, e_t in self.options.pairs(student, teacher):
            # one dissimilarity alone does not vary
            related = float(len(e_s) > 2)
            s, t = self.deviations(e_s), self.deviations(e_t)
            values.append(related * (1 - (s * t).sum()))
        return torch.stack(values).mean()

    def deviations(self, e: Tensor) -> Tensor:
        """Turn embeddings (N, D) into deviations of their dissimilarities from the mean, (N * N),
        of L2 norm 1.
        """
        itself = torch.eye(len(e), dtype=torch.bool, device=e.device)
        count = max(len(e) * (len(e) - 1), 1)
        if self.options.distance == "cosine":
            d = cosine(e).masked_fill(itself, 0.0)
        else:
            d = euclidean(e).masked_fill(itself, 0.0)
            d = d / (d.sum() / count).clamp_min(1e-6)
        deviations = (d - d.sum() / count).masked_fill(itself, 0.0)
        # 1e-3 bounds the gradient where they hardly vary
        return F.normalize(deviations.flatten(), dim=0, eps=1e-3)


def cosine(e: Tensor) -> Tensor:
    """Return how far the cosines of embeddings (N, D) are from 1, (N, N)."""
    # 1e-4 bounds the gradient of an embedding near 0, where torch's own 1e-12 does not
    e = F.normalize(e, eps=1e-4)
    return 1 - e @ e.T


def euclidean(e: Tensor) -> Tensor:
    """Return the distances of embeddings (N, D), (N, N)."""
    # centring changes no distance, and saves digits
    e = e - e.detach().mean(0)
    gram = e @ e.T
    square = gram.diagonal()
    # clamp before the root, whose slope at 0 is infinite
    return (square[:, None] + square - 2 * gram).clamp_min(1e-12).sqrt()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [RepresentationalSimilarity]
