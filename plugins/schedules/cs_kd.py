"""Class-wise self-distillation (CS-KD): another image of the same class is the teacher.

Yun, Park, Lee, Shin, "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR
2020, arXiv:2003.13964, eq. 1 and 2: with `cross_entropy` and `logit_kl` at T = 4 the total is CE(x,
y) + lambda T^2 KL(P(x'; T) || P(x; T)), where x' is of the class of x and a constant. The paper
draws x and x' alike, so here each of a pair learns from the other in one forward. The released code
draws a second image for each of a batch, and answers it without gradient; labels and soft targets
then count for the first ones only (`mutual: false`).
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

import kdkit


class ClassWise(kdkit.Schedule):
    """Images come in pairs of one class; the student's answer to the one teaches it about the
    other.

    An epoch shows each image once, but for classes with an odd number of images. Cost: one forward
    and one backward per image, as the student alone; without `mutual`, one forward per image and
    one backward for every second. No model is kept beside the student.
    """

    name = "cs_kd"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        mutual: bool = Field(
            default=True,
            description=(
                "Each of a pair learns from the other; false: the first from the second, which has"
                " no gradient and no label."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()

        def both(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            _refuse_odd(batch)
            # pooled: the two texts of a pair have different tokens
            answer = student(batch.inputs).pooled()
            return [kdkit.Lesson(answer, [answer.detach().map(_swapped)])]

        def first(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            _refuse_odd(batch)
            # `by_class(2)` puts the images of a pair next to each other
            one, other = batch.map(lambda x: x[::2]), batch.map(lambda x: x[1::2])
            with torch.no_grad():
                teacher = student(other.inputs).pooled().detach()
            return [kdkit.Lesson(student(one.inputs).pooled(), [teacher], batch=one)]

        # the student teaches: losses that look into the teacher's network see its own
        yield kdkit.Stage(
            "class_wise",
            [student],
            both if self.options.mutual else first,
            arrange=kdkit.by_class(2),
            teachers=[student],
        )


def _swapped(x: Tensor) -> Tensor:
    return x.view(len(x) // 2, 2, *x.shape[1:]).flip(1).reshape(x.shape)


def _refuse_odd(batch: kdkit.Batch) -> None:
    if len(batch.labels) % 2:
        raise kdkit.RunError(
            f"cs_kd: a process got {len(batch.labels)} images of a batch, which are no pairs;"
            " change `data.batch_size`"
        )


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [ClassWise]
