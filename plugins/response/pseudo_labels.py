"""Pseudo-labels: the student learns the teacher's detections as if they were true boxes.

Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection", 2020,
arXiv:2005.04757, section 3, without its strong augmentation, which belongs to the data. The paper
keeps detections with scores of 0.9 and more of a Faster R-CNN, whose scores are probabilities; a
score here is that of task `detection`, which is smaller for detectors that multiply by a quality.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import kdkit

from ..labels._detector import OUTPUTS, loss_of, network_of
from ..tasks import _boxes as boxes


class PseudoLabels(kdkit.Loss):
    """Loss of the student's own kind of detector, with the teacher's detections for true boxes.

    Formula: sum over the terms of weight * term(student, D), with the terms of loss `detector`, and
    D = the boxes and classes that are left of the teacher's answer (B, A, 5 + K) after the
    threshold and non-maximum suppression; reduced as the student's detector does it

    Boxes are clipped to the image; what is less than a pixel wide or high is left out. Any two
    detectors of the same classes will do, as no rows are compared, and images need no labels. An
    image in which the teacher sees nothing teaches that there is nothing.
    """

    name = "pseudo_labels"
    knowledge = "response"
    tasks = frozenset({"detection"})
    whole_answers = True
    needs_networks = True
    capturable = False  # how many boxes the teacher finds differs from step to step

    class Options(kdkit.LossOptions):
        threshold: float = Field(
            default=0.3, ge=0, lt=1, description="Least score of a detection that is learnt."
        )
        overlap: float = Field(
            default=0.6,
            gt=0,
            le=1,
            description="IoU above which the lower of two detections of a class is left out.",
        )
        most: int = Field(
            default=100, gt=0, le=10_000, description="Maximum number of boxes in an image."
        )
        terms: dict[str, float] = Field(
            default_factory=dict,
            description="Weights of the student's terms, as in `detector` (default: 1 each).",
        )

        def taps(self) -> Sequence[kdkit.LayerPair]:
            # the teacher's logits, which it gives anyway: it need not be a network with `OUTPUTS`
            return [kdkit.LayerPair(student=name, teacher="logits") for name in OUTPUTS]

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        boxes.refuse_other_classes(student.logits, teacher.logits)
        self.network = (network_of(context),)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        assert isinstance(batch.inputs, Tensor)
        rule = boxes.Rule(self.options.threshold, self.options.overlap, self.options.most)
        found = boxes.detect(teacher.logits, rule, batch.inputs.shape[-2:])
        learnt = boxes.as_labels(boxes.padded([sound(rows) for rows in found], rule.most))
        (network,), terms = self.network, self.options.terms
        return loss_of(self, network, student, batch, learnt, terms)


def sound(found: Tensor) -> Tensor:
    """Leave out boxes that are less than a pixel wide or high, as the task does with true ones."""
    corners = found[:, boxes.BOX]
    return found[(corners[:, 2:] - corners[:, :2] >= 1).all(1)]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PseudoLabels]
