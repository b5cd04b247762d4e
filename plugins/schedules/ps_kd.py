"""Progressive self-knowledge distillation (PS-KD): the student as it was after the previous
epoch teaches it.

Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
2021, arXiv:2006.12000, section 3. The paper's loss is `soft_labels` with a share of the teacher
that grows over all E epochs, `alpha: {from: 0, to: 0.8, epochs: E}`, without `cross_entropy`. The
paper's share is a_T (e + 1) / E all through epoch e, counted from 0; the ramp moves with every step
and has come to that value at the epoch's end. The released code keeps what the student said of each
image when it was last trained on it; here the student of the epoch's end answers, in eval mode, to
the very images of the batch.

In the first epoch there is no teacher yet, and the released code puts the labels in its place. Here
the student's own answer of the moment stands there, as a constant: under any loss that is 0 when
student and teacher agree nothing is learnt from it (a run warns of that), and `soft_labels` follows
the labels with 1 - alpha of their gradient.
"""

import copy
from collections.abc import Iterator, Sequence

import torch

import kdkit


class ProgressiveSelf(kdkit.Schedule):
    """One stage: the student learns from a frozen copy of itself, taken at the end of the
    previous epoch.

    A step costs two forwards and one backward of the student an image, one forward in the first
    epoch; memory a second copy of its weights.
    """

    name = "ps_kd"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()
        previous = copy.deepcopy(student).freeze()

        def step(batch: kdkit.Batch, moment: kdkit.Moment) -> Sequence[kdkit.Lesson]:
            answer = student(batch.inputs)
            with torch.no_grad():
                taught = answer if moment.epoch == 0 else previous(batch.inputs)
            return [kdkit.Lesson(answer, [taught.detach()])]

        def remember() -> None:
            previous.module.load_state_dict(student.module.state_dict())

        # a buffer: a resumed run goes on with the teacher of the last finished epoch
        yield kdkit.Stage("train", [student], step, after_epoch=remember, buffers=[previous])


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [ProgressiveSelf]
