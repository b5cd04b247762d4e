"""Pooled outputs distillation (POD): maps are compared after a sum over their rows, and one over
their columns, so that a network that learns further classes keeps some freedom.

Douillard, Cord, Ollion, Robert, Valle, "PODNet: Pooled Outputs Distillation for Small-Tasks
Incremental Learning", ECCV 2020, arXiv:2004.13513, equations 2 to 4 (POD-spatial). As in the
released code, activations are squared, and the sums of both directions are one vector of unit
length. The paper's POD-flat is the loss `embedding`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class PooledOutputs(kdkit.Loss):
    """Distance of the maps' sums over rows and over columns.

    Formula: norm(p(f_s) - p(f_t)), mean over the batch, then over the layer pairs; p(f) =
    normalise([sum_h f^2, sum_w f^2])

    Maps (B, C, H, W) of equally many channels, or tokens of a square grid; the larger one is
    average-pooled to the smaller. `normalise` divides by the L2 norm of the C * (W + H) sums. Where
    both are equal, as when a student begins as its teacher, the gradient is 0.

    Raises:
        ShapeError: the layers have different numbers of channels.
    """

    name = "pod"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        """Which layers are compared."""

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            for pair, (f_s, f_t) in zip(self.layers, self.pairs(student, teacher), strict=True):
                if f_s.shape[1] != f_t.shape[1]:
                    raise kdkit.ShapeError(
                        f"student '{pair.student}' has {f_s.shape[1]} channels and teacher"
                        f" '{pair.teacher}' {f_t.shape[1]}; `pod` compares channel by channel: name"
                        " layers of one width"
                    )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        distances = []
        for f_s, f_t in self.options.pairs(student, teacher):
            f_s, f_t = kdkit.pooled_alike(f_s, f_t)
            # its gradient at 0 is 0
            norms = torch.linalg.vector_norm(pooled(f_s) - pooled(f_t), dim=1)
            distances.append(norms.mean())
        return torch.stack(distances).mean()


def pooled(f: Tensor) -> Tensor:
    """Maps (B, C, H, W) to unit vectors of the sums over rows and columns, (B, C * (W + H))."""
    f = f.square()
    sums = torch.cat([f.sum(2).flatten(1), f.sum(3).flatten(1)], 1)
    return F.normalize(sums, eps=1e-12)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PooledOutputs]
