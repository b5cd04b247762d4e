"""Similarity preservation: samples that look alike to the teacher look alike to the student.

Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, eq. 1 to 4.
Summed over layer pairs there, averaged here. A sample whose features are all zero, for which the
usual form has a gradient near 1e12, has none here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class SimilarityPreserving(kdkit.Loss):
    """Mean squared difference between the two models' matrices of similarities within the batch.

    Formula: |G(f_s) - G(f_t)|^2 / N^2 with G(f) the rows of f f^T divided by their L2 norms, mean
    over the layer pairs

    |.|^2 is the squared Frobenius norm. Features (B, ...) are flattened to (B, D); the two models'
    sizes need not agree. A batch of one gives 0.
    """

    name = "sp"
    knowledge = "relation"
    Options = kdkit.RelationOptions
    options: kdkit.RelationOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = self.options.pairs(student, teacher)
        return torch.stack(
            [F.mse_loss(similarity(e_s), similarity(e_t)) for e_s, e_t in pairs]
        ).mean()


def similarity(f: Tensor) -> Tensor:
    """Embeddings (N, D) to their Gram matrix with rows of unit length, (N, N)."""
    gram = f @ f.T
    # A row's norm goes to 0 with its sample's features, as |f_i| * |f|; it says nothing then (nor
    # does a batch of one).
    silent = gram.detach().norm(dim=1, keepdim=True) <= 1e-6 * f.detach().norm()
    return F.normalize(gram.masked_fill(silent | (len(f) < 2), 0.0))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SimilarityPreserving]
