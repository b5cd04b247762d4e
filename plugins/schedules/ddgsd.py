"""Data-distortion guided self-distillation (DDGSD): two augmentations of an image teach each
other.

Xu, Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019,
doi:10.1609/aaai.v33i01.33015565: cross-entropy of both views, KL divergence between their
predictions both ways, and a distance between their global features (the paper's is the squared
difference of the features' means over the batch; here it is whatever feature loss the recipe has).
The losses are means over the views of a batch, where the paper adds one term per view.

`mutual: false` is consistency with one view as the target: Laine, Aila, "Temporal Ensembling for
Semi-Supervised Learning", ICLR 2017, arXiv:1610.02242, the Pi-model, whose squared difference has a
gradient through both views; `mutual` with a squared loss is that.
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class TwoViews(kdkit.Schedule):
    """Each image comes in two augmentations; the student's answer to the one teaches it about
    the other.

    Both views have the label. Cost: two forwards and two backwards per image, in one batch of twice
    the size; without `mutual`, whose second view has no gradient and no label, two forwards and one
    backward. No model is kept beside the student.
    """

    name = "ddgsd"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        mutual: bool = Field(
            default=True,
            description=(
                "Each view learns from the other; false: the first from the second, which has no"
                " gradient and no label."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()

        def both(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            images = [x for x in (batch.inputs, batch.views[0]) if isinstance(x, Tensor)]
            twice = kdkit.Batch(
                torch.cat(images), torch.cat([batch.labels] * 2), torch.cat([batch.index] * 2)
            )
            answer = student(twice.inputs)
            return [kdkit.Lesson(answer, [answer.detach().map(_swapped)], batch=twice)]

        def first(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            with torch.no_grad():
                teacher = student(batch.views[0]).detach()
            return [kdkit.Lesson(student(batch.inputs), [teacher])]

        # the student teaches: losses that look into the teacher's network see its own
        yield kdkit.Stage(
            "two_views",
            [student],
            both if self.options.mutual else first,
            views=2,
            teachers=[student],
        )


def _swapped(x: Tensor) -> Tensor:
    # the second views stand behind all first ones: half the rows on
    return x.roll(len(x) // 2, 0)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [TwoViews]
