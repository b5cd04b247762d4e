"""Flow of the solution procedure (FSP): how one layer's channels go with the next one's, in the
student as in the teacher.

Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
Transfer Learning", CVPR 2017, doi:10.1109/CVPR.2017.754, eq. 1 and 2. The reduction (element mean,
where the paper weighs and sums) and consecutive layers as pairs are those of the benchmark of Tian
et al., "Contrastive Representation Distillation", ICLR 2020. Of two layers of different size, the
paper max-pools the larger; here it is average-pooled, as there.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class SolutionFlow(kdkit.Loss):
    """Mean squared difference of the matrices of products between consecutive layers (FSP
    matrices).

    Formula: (G(f_s, g_s) - G(f_t, g_t))^2 with G(f, g) = f g^T / (H W), mean over all elements,
    then over the consecutive layers

    f and g are one model's maps at a layer and at the next one that `layers` names: three layers
    make two matrices, of 1 and 2, and of 2 and 3. Maps (B, C, H, W), or tokens of a square grid;
    the larger of f and g is average-pooled to the smaller. At each layer the student must have as
    many channels as the teacher; the two models' sizes need not agree.
    """

    name = "fsp"
    knowledge = "feature"
    Options = kdkit.MapOptions
    options: kdkit.MapOptions

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        layers, pairs = self.options.taps(), list(self.options.pairs(student, teacher))
        if len(pairs) < 2:
            raise kdkit.ShapeError(
                f"student '{layers[0].student}' {tuple(pairs[0][0].shape)} and teacher"
                f" '{layers[0].teacher}' {tuple(pairs[0][1].shape)} are one layer, which has no"
                " flow to a next one; name two or more in `layers`, in the network's order"
            )
        for layer, (f_s, f_t) in zip(layers, pairs, strict=True):
            if f_s.shape[1] != f_t.shape[1]:
                raise kdkit.ShapeError(
                    f"student '{layer.student}' {tuple(f_s.shape)} and teacher '{layer.teacher}'"
                    f" {tuple(f_t.shape)} must have equally many channels, so that the FSP matrices"
                    " have one shape; name other layers, or take a student as wide as the teacher"
                )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        maps_s, maps_t = zip(*self.options.pairs(student, teacher), strict=True)
        both = zip(flows(maps_s), flows(maps_t), strict=True)
        return torch.stack([F.mse_loss(g_s, g_t) for g_s, g_t in both]).mean()


def flows(maps: Sequence[Tensor]) -> list[Tensor]:
    """One model's maps at several layers to the FSP matrices (B, C1, C2) of each layer and the
    next.
    """
    pooled = (kdkit.pooled_alike(f, g) for f, g in itertools.pairwise(maps))
    # a mean over positions, so that the two models' sizes need not agree
    return [f.flatten(2) @ g.flatten(2).mT / f[0, 0].numel() for f, g in pooled]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SolutionFlow]
