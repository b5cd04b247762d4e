"""Centred kernel alignment: the student's and the teacher's Gram matrices point the same way.

Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", ICML
2019, arXiv:1905.00414, section 3, with the linear kernel, as a loss. `patches`, over the tokens of
an image instead of the images of a batch, is the patch kernel alignment of arXiv:2509.05606. The
released code of Zhou et al., "Rethinking Centered Kernel Alignment in Knowledge Distillation",
IJCAI 2024, arXiv:2401.11824, leaves out the centring (`centre: false`) and takes weight 15.

Of an N x N and a D x D form with one value, the smaller is computed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ..feature._tokens import token_pairs


class KernelAlignment(kdkit.Loss):
    """Lack of alignment of the two models' Gram matrices of embeddings.

    Formula: 1 - |Y' X|^2 / (|X' X| * |Y' Y|), no unit, mean over the layer pairs (with `patches`,
    over the images first)

    X (N, D) are the student's embeddings, less their mean over the samples, Y the teacher's; |.| is
    the Frobenius norm. Larger features are flattened, texts averaged; the two models' sizes need
    not agree. Neither scale nor rotation matters. With `patches`, X and Y are the tokens (N, D) of
    one image, equally many on both sides, or the positions of its maps; padding does not count, and
    `gather` has no effect. A batch of one, or an image of one token, gives 0.
    """

    name = "cka"
    knowledge = "relation"

    class Options(kdkit.RelationOptions):
        centre: bool = Field(
            default=True, description="Subtract the mean over samples (or tokens) first."
        )
        patches: bool = Field(
            default=False, description="Relate the tokens of each image, not the images of a batch."
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            # a generator raises only when it is read
            tuple(self.groups(student, teacher))

        def groups(
            self, student: kdkit.Outputs, teacher: kdkit.Outputs
        ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            """Return both models' rows (G, N, D) of each pair, and which of them count, (G, N).

            Raises:
                ShapeError: the layers have no such rows.
            """
            if self.patches:
                yield from token_pairs(self.layers, student, teacher)
                return
            for e_s, e_t in self.pairs(student, teacher):
                everyone = torch.ones(1, len(e_s), dtype=torch.bool, device=e_s.device)
                yield e_s[None], e_t[None], everyone

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        for f_s, f_t, real in self.options.groups(student, teacher):
            x, y = (self.unit(f, real) for f in (f_s, f_t))
            # one row has no relations
            values.append(((real.sum(1) > 1) * (1 - alignment(x, y))).mean())
        return torch.stack(values).mean()

    def unit(self, f: Tensor, real: Tensor) -> Tensor:
        """Scale the rows (G, N, D) of each group to a Frobenius norm of 1; others become 0."""
        counts = real[:, :, None].to(f.dtype)
        f = f * counts
        if self.options.centre:
            # a group of padding only would divide by 0
            f = (f - f.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)) * counts
        # 1e-4 bounds the gradient of rows near 0
        return F.normalize(f.flatten(1), eps=1e-4).view_as(f)


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Return the alignment of rows (G, N, D) and (G, N, E) of Frobenius norm 1 at most, (G,)."""
    if x.shape[1] <= max(x.shape[2], y.shape[2]):
        grams_x, grams_y = x @ x.mT, y @ y.mT
        shared = (grams_x * grams_y).sum((1, 2))
    else:
        grams_x, grams_y = x.mT @ x, y.mT @ y
        shared = (y.mT @ x).square().sum((1, 2))
    # the square of the norm of rank R is 1 / R at least, unless the rows are nearly 0
    sizes = (g.square().sum((1, 2)).clamp_min(1e-6) for g in (grams_x, grams_y))
    return shared / (next(sizes) * next(sizes)).sqrt()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [KernelAlignment]
