"""Label-wise embedding distillation (LED): what the student sees of each label is arranged as the
teacher's is, over the images that share a label and over the labels that share an image.

Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang, "Multi-Label Knowledge Distillation", ICCV 2023,
arXiv:2308.06453. The paper's objective (L2D) is `bce` beside `mld` with weight 10 and this loss:

    - {use: bce}
    - {use: mld, weight: 10}
    - {use: led, layers: [{student: decoder, teacher: decoder}]}

Each network needs an embedding for each label; in the paper both have ML-Decoder as their head, a
transformer decoder with a query for each label (Ridnik et al., WACV 2023, arXiv:2111.12933).
Distances, their division by the mean and the Huber function are those of the released code, which
sums over pairs, labels and images; here all are means, so the paper's weights, 100 and 1000, do not
carry over.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class LabelWiseEmbeddings(kdkit.Loss):
    """Huber difference between the two models' distances of label-wise embeddings, each divided by
    its mean.

    Formula: class_aware * C + instance_aware * I, mean over the layer pairs; C is the mean over the
    labels k, and over the ordered pairs of images i != j that have k, of smooth_l1(D_ij), I the
    mean over the images i, and over the ordered pairs of labels k != l that i has, of
    smooth_l1(D_kl)

    D of a group is d_s / mean d_s - d_t / mean d_t with Euclidean distances d, at least 1e-6, and
    means over its pairs; smooth_l1 is quadratic below 1. An image has the labels of a share of at
    least 1/2; groups without a pair are left out. Layers give (B, K, D), an embedding for each of
    the K labels; the two models' D need not agree.
    """

    name = "led"
    knowledge = "relation"
    tasks = frozenset({"labels of samples"})

    class Options(kdkit.FeatureOptions):
        class_aware: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the images that share a label."
        )
        instance_aware: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the labels that share an image."
        )
        gather: bool = Field(
            default=False,
            description="Relate the samples of all processes, not of each process alone.",
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        labels = student.logits.shape[1]
        for pair, both in zip(
            self.options.layers, self.options.pairs(student, teacher), strict=True
        ):
            for name, e in zip((pair.student, pair.teacher), both, strict=True):
                if e.ndim != 3 or e.shape[1] != labels:
                    raise kdkit.ShapeError(
                        f"{self.name}: '{name}' {tuple(e.shape)} is not an embedding for each"
                        f" label, (B, {labels}, D); tap a decoder that has a query for each label"
                    )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, terms = self.options, []
        holds = (kdkit.gather(batch.labels) if o.gather else batch.labels) >= 0.5
        for e_s, e_t in o.pairs(student, teacher):
            if o.gather:
                e_s, e_t = kdkit.gather(e_s), kdkit.gather(e_t)
            by_label = difference(e_s.transpose(0, 1), e_t.transpose(0, 1), holds.T)
            by_image = difference(e_s, e_t, holds)
            terms.append(o.class_aware * by_label + o.instance_aware * by_image)
        return torch.stack(terms).mean()


def difference(e_s: Tensor, e_t: Tensor, members: Tensor) -> Tensor:
    """Mean difference of distances within groups of embeddings (G, N, D), of which `members` (G, N)
    count.
    """
    itself = torch.eye(members.shape[1], dtype=torch.bool, device=members.device)
    pairs = members[:, :, None] & members[:, None, :] & ~itself
    # a group without a pair: 0 / 1, not 0 / 0
    count = pairs.sum((1, 2)).clamp_min(1)
    d_s, d_t = (distances(e, pairs, count) for e in (e_s, e_t))
    each = F.smooth_l1_loss(d_s, d_t, reduction="none").sum((1, 2)) / count
    return each.sum() / pairs.any(2).any(1).sum().clamp_min(1)


def distances(e: Tensor, pairs: Tensor, count: Tensor) -> Tensor:
    """Euclidean distances over their mean (G, N, N); 0 where there is no pair."""
    # centred, which changes no distance and saves digits
    e = e - e.detach().mean(1, keepdim=True)
    gram = e @ e.mT
    square = gram.diagonal(dim1=1, dim2=2)
    # clamp before the root, whose slope at 0 is infinite
    d = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp_min(1e-12).sqrt()
    d = d.masked_fill(~pairs, 0.0)
    mean = (d.sum((1, 2)) / count).clamp_min(1e-6)
    return d / mean[:, None, None]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LabelWiseEmbeddings]
