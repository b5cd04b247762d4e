"""Binary cross-entropy on the labels: the supervised term where labels do not exclude each other.

Nam, Kim, Loza Mencia, Gurevych, Fuernkranz, "Large-scale Multi-label Text Classification -
Revisiting Neural Networks", ECML PKDD 2014, arXiv:1312.5419, section 3. Label smoothing is that of
`cross_entropy` for the two classes of each label: it holds, or it does not.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

Positive = Annotated[float, Field(gt=0)]


class BinaryCrossEntropy(kdkit.Loss):
    """Binary cross-entropy between each label and the student's prediction of it.

    Formula: -(w_k y_k log sigmoid(z_s)_k + (1 - y_k) log sigmoid(-z_s)_k), mean over the batch and
    the labels, in nats

    y is 1 where a label holds, 0 where it does not, or its share between; smoothed, it is
    (1 - label_smoothing) y + label_smoothing / 2. w is `pos_weight`: a share of y counts w times,
    what is left of it once; the mean is not divided by w. Student logits and labels (B, K); the
    teacher is not read. An answer that is softened by a teacher belongs in `mld` or `binary_kd`,
    which know no `pos_weight`.
    """

    name = "bce"
    knowledge = "labels"
    tasks = frozenset({"labels"})

    class Options(kdkit.LossOptions):
        pos_weight: Positive | tuple[Positive, ...] = Field(
            default=1.0,
            description=(
                "Weight of a label where it holds, against one where it does not: a number, or one"
                " for each label, K numbers; above 1, fewer labels are missed."
            ),
        )
        label_smoothing: float = Field(
            default=0.0,
            ge=0,
            lt=1,
            description="Share of every target that is replaced by 1/2.",
        )

    options: Options
    weights: Tensor

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        z_s = student.logits
        if z_s.ndim != 2 or (context is not None and z_s.shape[1] != context.outputs):
            wanted = f"(B, {context.outputs})" if context is not None else "(B, K)"
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(z_s.shape)} do not fit the labels, which need"
                f" {wanted}; give the student one logit per label of the dataset"
            )
        asked = self.options.pos_weight
        if isinstance(asked, tuple) and len(asked) != z_s.shape[1]:
            raise kdkit.ShapeError(
                f"{self.name}: {len(asked)} numbers of pos_weight for {z_s.shape[1]} labels"
            )
        # not part of a checkpoint: they are options
        self.register_buffer("weights", torch.tensor(asked), persistent=False)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s, smoothing = student.logits, self.options.label_smoothing
        y = (1 - smoothing) * batch.labels.to(z_s) + smoothing / 2
        # from logits: the logarithm of a sigmoid that rounds to 0 would be infinite
        return F.binary_cross_entropy_with_logits(z_s, y, pos_weight=self.weights.to(z_s))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [BinaryCrossEntropy]
