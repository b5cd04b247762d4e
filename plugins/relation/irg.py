"""Instance relationship graph: the teacher's answers, its distances between samples, and how far
each sample moves between layers.

Liu et al., "Knowledge Distillation via Instance Relationship Graph", CVPR 2019,
doi:10.1109/CVPR.2019.00726. The released code is a patch of Caffe; this follows its best known
port: squared distances over the largest of them, vertices that are the logits, edges averaged over
the layers. The port has fixed layers and halves channels; here any consecutive layers are brought
to one size by averaging, the same where it halves.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class InstanceGraph(kdkit.Loss):
    """Squared differences between the two models' graphs of a batch: vertices, edges, and
    transformations between layers.

    Formula: vertex * V + edge * E + transformation * T, each a mean of squared differences between
    the student's and the teacher's v, e, t

    v are the logits, averaged over all elements. e_ij = |f_i - f_j|^2 over the largest of the
    batch, averaged over all N^2 pairs, then over the layers. t_i = |f_i - g_i|^2 over the largest
    of the batch, where f and g are a sample's features in two consecutive layers, averaged over the
    samples, then over the consecutive layers. For e, features (B, ...) are flattened. For t, they
    are maps, tokens of a square grid or vectors (taken as maps of one pixel); the larger is
    average-pooled and neighbouring channels of the wider are averaged. The two models' sizes need
    not agree, their logits must unless `vertex` is 0. Of a batch of one, only the vertices count.
    """

    name = "irg"
    knowledge = "relation"
    # they are the vertices
    needs_teacher_logits = True

    class Options(kdkit.RelationOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            min_length=2, description="Student/teacher layer pairs, shallow to deep."
        )
        vertex: kdkit.Rampable = Field(
            default=0.1, ge=0, description="Factor of the squared differences between logits."
        )
        edge: kdkit.Rampable = Field(
            default=5.0, ge=0, description="Factor of those between distances of samples."
        )
        transformation: kdkit.Rampable = Field(
            default=5.0,
            ge=0,
            description="Factor of those between samples' ways from layer to layer.",
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            super().check(student, teacher)
            # without vertices, logits of other classes will do
            if self.vertex:
                kdkit.ResponseOptions().check(student, teacher)
            for pair in self.layers if self.transformation else ():
                f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
                try:
                    grid(f_s, student.mask), grid(f_t, student.mask)
                except kdkit.ShapeError:
                    raise kdkit.ShapeError(
                        f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                        f" {tuple(f_t.shape)} must be maps (B, C, H, W), tokens (B, N, D) of a"
                        " square grid or vectors (B, D), to be compared with the next layer; name"
                        " other layers, or set `transformation` to 0"
                    ) from None

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, value = self.options, student.logits.new_zeros(())
        if o.vertex:
            value = value + o.vertex * F.mse_loss(student.logits, teacher.logits)
        if o.edge:
            edges = [
                F.mse_loss(distances(e_s), distances(e_t)) for e_s, e_t in o.pairs(student, teacher)
            ]
            value = value + o.edge * torch.stack(edges).mean()
        if o.transformation:
            ways_s = self.ways(student.features[pair.student] for pair in o.layers)
            ways_t = self.ways(teacher.features[pair.teacher] for pair in o.layers)
            errors = [F.mse_loss(t_s, t_t) for t_s, t_t in zip(ways_s, ways_t, strict=True)]
            value = value + o.transformation * torch.stack(errors).mean()
        return value

    def ways(self, layers: Iterable[Tensor]) -> list[Tensor]:
        """How far each sample moves between consecutive layers, over the farthest of the batch,
        (N,).
        """
        moves = []
        for f, g in itertools.pairwise(grid(f) for f in layers):
            f, g = kdkit.pooled_alike(f, g)
            width = min(f.shape[1], g.shape[1])
            move = (narrowed(f, width) - narrowed(g, width)).square().sum((1, 2, 3))
            # the largest of the whole batch, not of a process's share
            moves.append(over_largest(kdkit.gather(move) if self.options.gather else move))
        return moves


def grid(f: Tensor, mask: Tensor | None = None) -> Tensor:
    """Features as maps (B, C, H, W), a vector as one of a single pixel; those of texts, whose
    tokens a mask tells, have no grid.
    """
    return f[:, :, None, None] if f.ndim == 2 else kdkit.as_map(f, mask)


def narrowed(f: Tensor, width: int) -> Tensor:
    """Maps with fewer channels (B, width, H, W), each the mean of neighbouring ones."""
    return (
        f
        if f.shape[1] == width
        else F.adaptive_avg_pool1d(f.flatten(2).mT, width).mT.reshape(len(f), width, *f.shape[2:])
    )


def distances(e: Tensor) -> Tensor:
    """Embeddings (N, D) to squared Euclidean distances over the largest, (N, N)."""
    # changes no distance, and saves digits of the Gram matrix
    e = e - e.detach().mean(0)
    gram = e @ e.T
    square = gram.diagonal()
    itself = torch.eye(len(e), dtype=torch.bool, device=e.device)
    return over_largest(
        # rounding leaves values below 0, and on the diagonal values beside 0
        (square[:, None] + square - 2 * gram).clamp_min(0.0).masked_fill(itself, 0.0)
    )


def over_largest(squares: Tensor) -> Tensor:
    """Squared distances over the largest; those of a batch of one, or of which all are below
    1e-10, say little or nothing.
    """
    # clamped: a batch of equal samples would divide by 0
    return squares / squares.amax().clamp_min(1e-10) if len(squares) > 1 else 0.0 * squares


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [InstanceGraph]
