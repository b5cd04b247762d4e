"""Localisation distillation: the student's distribution of each side of a box follows the
teacher's.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252,
section 3. The released code takes the points that answer for true boxes, weighs them by the
student's scores, and takes the mean over the bins, where kdkit has the divergence: a weight of 0.25
there is 0.25 / 17 here at 16 bins. Here all points count, weighted by the teacher's scores, as in
Wang et al., "CrossKD", CVPR 2024, arXiv:2306.11369, which has a temperature of 1.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ..tasks import _boxes as boxes

SIDES = 4
RAW = "output1"


class LocalisationDistillation(kdkit.Loss):
    """KL divergence between distributions over the distances of a box's sides from its point.

    Formula: T^2 * sum over rows of w * KL(softmax(d_t / T) || softmax(d_s / T)) / max(1, sum over
    rows of w), mean over the four sides of a row, over all rows of the batch, in nats

    d are logits of `bins` + 1 distances, (B, A, 4, bins + 1), of both networks, which must be
    `detector/gfl` with equal rows and bins; w is the teacher's best score of a class at the row. In
    several processes, each divides by its own sum of w.
    """

    name = "ld"
    knowledge = "response"
    tasks = frozenset({"detection"})
    whole_answers = True
    needs_networks = True
    exceptions = {"check_teaches_every_part": "it teaches boxes, not the classes of a row"}

    class Options(kdkit.LossOptions):
        temperature: kdkit.Rampable = Field(
            default=10.0, gt=0, description="T: how much unlikely distances matter."
        )

        def taps(self) -> Sequence[kdkit.LayerPair]:
            return [kdkit.LayerPair(student=RAW, teacher=RAW)]

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        boxes.refuse_other_classes(student.logits, teacher.logits)
        boxes.refuse_other_rows([student.logits, teacher.logits])
        networks = (None, None) if context is None else (context.student, context.teacher)
        ours, theirs = (getattr(network, "bins", None) for network in networks)
        if ours is None or ours != theirs:
            raise kdkit.ShapeError(
                f"the student has {_named(ours)}, the teacher {_named(theirs)}; both must be"
                " `detector/gfl` with equal `bins`"
            )
        self.bins = ours

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        t = self.options.temperature
        log_p, log_q = (
            F.log_softmax(self._distributions(answer.features[RAW]) / t, dim=-1)
            for answer in (student, teacher)
        )
        divergences = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean(-1)
        weights = boxes.scores_of(teacher.logits).amax(2)
        return t**2 * (weights * divergences).sum() / weights.sum().clamp_min(1)

    def _distributions(self, raw: Tensor) -> Tensor:
        """Logits (B, A, 4, bins + 1) of the distances, which a detector gives before others."""
        width = self.bins + 1
        return raw[..., : SIDES * width].reshape(*raw.shape[:2], SIDES, width)


def _named(bins: int | None) -> str:
    return "no distributions of boxes" if bins is None else f"{bins} bins"


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LocalisationDistillation]
