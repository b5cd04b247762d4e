"""Projector ensemble: several small projectors of the student's embedding must, on average, point
where the teacher's embedding points.

Chen, Wang, Liu, Xu, de Hoog, Huang, "Improved Feature Distillation via Projector Ensemble", NeurIPS
2022, arXiv:2210.15274, section 3. The paper's weight is 25, beside a cross-entropy of weight 1 and
no loss on logits. The released code divides by the norm of the projection itself, which is 0 where
all projectors' ReLUs are silent; here vectors of norm below 1e-6 have no direction, and count as
orthogonal to all others.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class ProjectorEnsemble(kdkit.Loss):
    """Cosine distance of the teacher's vectors from the mean of several projections of the
    student's.

    Formula: 1 - cos(mean_i ReLU(W_i v_s + b_i), v_t), mean over the batch, then over the layer
    pairs

    W_i and b_i are learnt, i = 1 to `projectors`, each with its own random beginning. Vectors
    (B, D) of any widths, usually 'penultimate'; maps are averaged over their positions, tokens over
    the sequence. It suits teacher layers behind a ReLU: a projection is never negative.
    """

    name = "pefd"
    knowledge = "feature"

    class Options(kdkit.VectorOptions):
        projectors: int = Field(
            default=3, ge=1, le=64, description="Number of projectors, q in the paper."
        )

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        # one layer holds all projectors: their first weights depend on its input's width alone
        self.adapters = nn.ModuleList(
            nn.Linear(v_s.shape[1], self.options.projectors * v_t.shape[1])
            for v_s, v_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        distances = []
        for adapter, (v_s, v_t) in zip(
            self.adapters, self.options.pairs(student, teacher), strict=True
        ):
            projected = adapter(v_s).relu().unflatten(1, (self.options.projectors, -1)).mean(1)
            directions = (F.normalize(v, dim=1, eps=1e-6) for v in (projected, v_t))
            distances.append(1 - torch.linalg.vecdot(*directions).mean())
        return torch.stack(distances).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ProjectorEnsemble]
