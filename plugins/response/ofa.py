"""One for all (OFA): soft targets with an enhanced label, for the student's prediction and for
those of its stages.

Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation", NeurIPS 2023, arXiv:2310.19444, the OFA loss at temperature 1. As in the released
code, the branches' losses are summed with that of the logits, and the label of a mixed sample is
the class with the largest share. There a branch is a stack of convolutions or blocks as deep as the
rest of the network and the exponent may differ between branches; here a branch is a mean over
positions and a linear layer, under one exponent.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class OneForAll(kdkit.Loss):
    """Cross-entropy with the teacher's prediction, its label raised, for the student's logits
    and for classifiers of its stages.

    Formula: -sum_c ((q_c + [c = y])^eps - [c = y]) log p_c, mean over the batch, summed over the
    logits and the branches, in nats

    q = softmax(z_t), y is the label, p the softmax of the student's logits or of a branch's. At eps
    1 it is the plain cross-entropy with q; a larger one raises the label the more the surer the
    teacher is of it. Logits (B, K) on both sides; stages are maps (B, C, H, W), tokens (B, N, D) or
    vectors (B, D).
    """

    name = "ofa"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            default=(),
            description=(
                "Student layers that get a classifier of their own; the teacher's side is always"
                " `logits`."
            ),
        )
        eps: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            le=10,
            description="Exponent of the enhanced target; 1 is the plain soft target.",
        )

        def taps(self) -> Sequence[kdkit.LayerPair]:
            return self.layers

    options: Options
    branches: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        self.branches = nn.ModuleList()
        for pair in self.options.layers:
            f_s = student.features[pair.student]
            try:
                width = kdkit.as_vectors(f_s).shape[1]
            except kdkit.ShapeError as error:
                raise kdkit.ShapeError(
                    f"student '{pair.student}' {tuple(f_s.shape)} is {error}; name a stage"
                ) from None
            self.branches.append(nn.Linear(width, student.logits.shape[1]))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        q = teacher.logits.softmax(1)
        # of a mixed sample the class with the largest share, as in the released code
        label = F.one_hot(batch.classes, q.shape[1]).to(q)
        # the label is added before the power and taken off behind it: at eps 1 this is q itself
        target = (q + label) ** self.options.eps - label
        stages = (
            kdkit.as_vectors(student.features[pair.student], student.mask)
            for pair in self.options.layers
        )
        branches = (branch(f_s) for branch, f_s in zip(self.branches, stages, strict=True))
        return torch.stack(
            [-(target * z.log_softmax(1)).sum(1).mean() for z in (student.logits, *branches)]
        ).sum()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [OneForAll]
