"""The teacher's boxes: a bound for the student's error on true boxes, or what it learns.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge
Distillation", NIPS 2017,
https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation
section 3.3, with GIoU in place of the squared error of offsets, which detectors encode in different
ways, and rows chosen and weighted by the teacher instead of by a detector's own rule. Without a
bound it is the loss on boxes of Wang et al., "CrossKD", CVPR 2024, arXiv:2306.11369, on the
student's own boxes.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

import kdkit

from ..tasks import _boxes as boxes
from ..tasks._iou import generalized, overlaps


class BoxRegression(kdkit.Loss):
    """Error of the student's boxes, weighted by the teacher's scores.

    Formula: sum over rows of w * e / max(1, sum over rows of w), over all rows of the batch

    With `bound: truth`, rows count whose teacher's box overlaps a true box by an IoU of at least
    `overlap`; with b the one that it overlaps most, w = the teacher's score of the class of b, and
    e = e_s if e_s + margin > e_t, else 0, with e_s = 1 - GIoU(student, b) and e_t = 1 -
    GIoU(teacher, b): the student learns from true boxes where it is not better than the teacher.
    With `bound: none`, every row counts, w = the teacher's best score of a class, and e = 1 -
    GIoU(student, teacher): no labels are read.

    Scores are those of task `detection`. Answers (B, A, 5 + K) with as many rows on both sides;
    targets (B, M, 6), of which boxes that do not count are left out.
    """

    name = "box_regression"
    knowledge = "response"
    tasks = frozenset({"detection"})
    whole_answers = True
    exceptions = {
        "check_teaches_every_part": "it teaches boxes, not the classes and the quality of a row"
    }

    class Options(kdkit.LossOptions):
        bound: Literal["truth", "none"] = Field(
            default="truth",
            description=(
                "`truth`: learn from true boxes where the teacher is better; `none`: learn the"
                " teacher's boxes."
            ),
        )
        margin: kdkit.Rampable = Field(
            default=0.0,
            ge=0,
            le=2,
            description="By how much the student's error must be below the teacher's to be let go.",
        )
        overlap: float = Field(
            default=0.5,
            gt=0,
            le=1,
            description="Least IoU of the teacher's box with a true one, for a row to count.",
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            boxes.refuse_other_classes(student.logits, teacher.logits)
            boxes.refuse_other_rows([student.logits, teacher.logits])

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        b_s, b_t = (answer.logits[..., boxes.BOX] for answer in (student, teacher))
        scores = boxes.scores_of(teacher.logits)
        if self.options.bound == "none":
            weights, errors = scores.amax(2), 1 - generalized(b_s, b_t)
        else:
            truth, weights = self._nearest(b_t, scores, batch.labels.to(b_t))
            e_s, e_t = (1 - generalized(b, truth) for b in (b_s, b_t))
            errors = e_s.where(e_s + self.options.margin > e_t, 0.0)
        return (weights * errors).sum() / weights.sum().clamp_min(1)

    def _nearest(self, b_t: Tensor, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Find the true box (B, A, 4) of each row, and the row's weight (B, A)."""
        targets, counts = boxes.counted(targets)
        ious = overlaps(b_t[:, :, None], targets[:, None, :, boxes.BOX])
        best = ious.where(counts[:, None], 0.0).max(2)
        truth = targets.gather(1, best.indices[..., None].expand(-1, -1, 6))
        label = truth[..., boxes.LABEL, None].long().clamp_min(0)
        weights = scores.gather(2, label)[..., 0].where(best.values >= self.options.overlap, 0.0)
        return truth[..., boxes.BOX], weights


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [BoxRegression]
