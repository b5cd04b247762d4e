"""Score-weighted features: the student's pyramid follows the teacher's where the teacher sees
something.

Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021, arXiv:2111.00674: the
teacher's best class score at a place weighs the squared error there; its loss on classes, weighted
likewise, is left out. As in the distillation of Ultralytics' detectors, of which the formula alone
is taken, the projector has two convolutions and the error is divided by the channels; the factor of
the batch size there is left out. The paper's code sums over the channels (a weight of 0.01 there is
2.56 here at 256 channels) and divides by zero where the teacher has no score.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..tasks import _boxes as boxes
from ._pyramid import PYRAMID


class ScoreWeighted(kdkit.Loss):
    """Squared error of the teacher's maps, predicted from the student's by a learnt projector P,
    in a mean that is weighted by the teacher's scores.

    Formula: sum over batch, channels and places of s * (P(f_s) - f_t)^2 / (C * sum over batch and
    places of s + 1e-9), sum over the layer pairs

    s is the best score (task `detection`) of a class at a place of the teacher's map f_t, over all
    anchors there; P a 1x1 convolution, ReLU and a 1x1 convolution, C_s -> C_t -> C_t. A student's
    map of another size is resized (bilinear). A batch in which every score is 0 gives 0.

    Rows of the teacher's answer (B, A, 5 + K) belong to maps as detectors order them: maps from
    fine to coarse, in each one rows, columns and anchors. The pairs must therefore begin with the
    finest map and leave none out; coarser ones may be missing, and are taken to halve the size each
    time, rounded up. The teacher's network says how many anchors there are at a place.
    """

    name = "score_weighted"
    knowledge = "feature"
    tasks = frozenset({"detection"})
    needs_teacher_logits = True
    needs_networks = True

    class Options(kdkit.MapOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            default=PYRAMID,
            min_length=1,
            description=(
                "Student/teacher maps to compare, from fine to coarse (default: all maps of"
                " torchvision's feature pyramid)."
            ),
        )

    options: Options
    projectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.projectors = nn.ModuleList()
        sizes = []
        for f_s, f_t in self.options.pairs(student, teacher):
            width = f_t.shape[1]
            self.projectors.append(
                nn.Sequential(
                    nn.Conv2d(f_s.shape[1], width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)
                )
            )
            sizes.append((f_t.shape[2], f_t.shape[3]))
        network = None if context is None else context.teacher
        self.anchors = anchors_of(network, teacher.logits, sizes)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        best = boxes.scores_of(teacher.logits).amax(2)
        value, start = student.logits.new_zeros(()), 0
        for project, count, (f_s, f_t) in zip(
            self.projectors, self.anchors, self.options.pairs(student, teacher), strict=True
        ):
            height, width = f_t.shape[2:]
            end = start + height * width * count
            score = best[:, start:end].view(len(f_t), 1, height, width, count).amax(4)
            error = (kdkit.resized(project(f_s), f_t.shape[2:]) - f_t).square()
            value = value + (score * error).sum() / (f_t.shape[1] * score.sum() + 1e-9)
            start = end
        return value


def anchors_of(network: Any, answer: Tensor, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Find how many rows of a detector's answer belong to each place of maps.

    Args:
        network: the detector.
        answer: its answer, (B, A, 5 + K).
        sizes: (h, w) of some maps of its pyramid, those from the finest on.

    Raises:
        ShapeError: it is no detector, or its rows are not those of these maps and coarser ones.
    """
    if not hasattr(network, "anchors_at_a_place"):
        raise kdkit.ShapeError(
            "the teacher is no detector whose rows are anchors or points; take `detector/fcos`,"
            " `torchvision/retinanet_resnet50_fpn`..."
        )
    counts: list[int] = network.anchors_at_a_place()
    whole = list(sizes)
    while len(whole) < len(counts):
        whole.append(((whole[-1][0] + 1) // 2, (whole[-1][1] + 1) // 2))
    areas = [height * width for height, width in whole]
    rows = sum(count * area for count, area in zip(counts, areas, strict=False))
    fits = len(whole) == len(counts) and areas == sorted(areas, reverse=True)
    if not fits or answer.ndim != 3 or rows != answer.shape[1]:
        shown = ", ".join(f"{height} x {width}" for height, width in whole)
        raise kdkit.ShapeError(
            f"the teacher's answer {tuple(answer.shape)} does not have the rows of maps of {shown};"
            " `layers` must name the maps of its pyramid in their order, from the finest on"
        )
    return counts[: len(sizes)]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ScoreWeighted]
