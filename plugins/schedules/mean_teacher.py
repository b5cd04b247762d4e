"""Mean teacher: an exponential moving average of the student's weights teaches it.

Tarvainen, Valpola, "Mean teachers are better role models: Weight-averaged consistency targets
improve semi-supervised deep learning results", NeurIPS 2017, arXiv:1703.01780, section 2. After
optimizer step n,

    average = d average + (1 - d) student,   d = min(1 - 1 / (n + 1), decay)

so the plain mean of all weights so far, the initial ones included, until that is slower than
`decay`; as in the released code. That code averages parameters alone and runs the average in train
mode, with noise and batch statistics of its own; here it runs in eval mode, with averaged batch
norm statistics. The paper's consistency cost is the recipe's losses: `logit_mse` or `logit_kl`,
with a ramped weight.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import nn

import kdkit


class MeanTeacher(kdkit.Schedule):
    """One stage: the student learns from an exponential moving average of its own weights.

    A step costs two forwards and one backward of the student an image; memory a second copy of its
    weights. What is measured and exported is the student; `train.ema` puts an average in its place.
    """

    name = "mean_teacher"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        decay: float = Field(
            default=0.999,
            ge=0,
            lt=1,
            description="Share of the old average that is kept at each step.",
        )
        second_view: bool = Field(
            default=True,
            description=(
                "The average sees another augmentation of each image than the student, as in the"
                " paper."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()
        average = copy.deepcopy(student).freeze()

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            with torch.no_grad():
                taught = average(
                    batch.views[0] if self.options.second_view else batch.inputs
                ).detach()
            return [kdkit.Lesson(student(batch.inputs), [taught])]

        def follow(moment: kdkit.Moment) -> None:
            # the plain mean at first: a decay of 0.999 would hold on to the initial weights
            share = max(1 / (moment.step + 1), 1 - self.options.decay)
            move(average.module, student.module, share)

        views = 2 if self.options.second_view else 1
        # a buffer: saved and restored with the stage
        yield kdkit.Stage(
            "train", [student], step, after_step=follow, buffers=[average], views=views
        )


@torch.no_grad()
def move(average: nn.Module, student: nn.Module, share: float) -> None:
    """Take the average a share of the way to the student; whole numbers, such as counts, are the
    student's.
    """
    new = student.state_dict()
    for name, old in average.state_dict().items():
        if old.is_floating_point():
            old.lerp_(new[name], share)
        else:
            # the mean of two counts is no count
            old.copy_(new[name])


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [MeanTeacher]
