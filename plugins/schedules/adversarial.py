"""Adversarial distillation: the student is attacked in every step, and learns what the teacher
says of the images as they were.

The student answers to the images and, as the view `attacked`, to images that were changed against
it by projected gradient descent (Madry et al., ICLR 2018, arXiv:1706.06083). The teacher sees the
images alone. A loss with `view: attacked` compares the answers to the attack. So the recipes of the
papers are, with p the student, q the teacher and x' the attacked images:

ARD: Goldblum et al., "Adversarially Robust Distillation", AAAI 2020, arXiv:1905.09747: a T^2
KL(q(x) || p(x')) + (1 - a) CE(p(x)), a = 1, T = 30; ten steps against the labels from a uniform
start, the defaults here. Its released code takes the mean over batch and classes, 1/K of the
`logit_kl` of kdkit: the same objective has `weight: 1/K` here.

RSLAD: Zi et al., "Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student
Better", ICCV 2021, arXiv:2108.07969: 5/6 KL(q(x) || p(x')) + 1/6 KL(q(x) || p(x)), T = 1; `against:
teacher`, the steps raise KL(q(x) || p(x')), `start: normal`. Again the mean over the classes too.

`adversarial_alone` is the same without a teacher: with `cross_entropy` on the view it is the
adversarial training of Madry et al. In all of them the attack runs in eval mode, as RSLAD's does;
ARD's and Madry's codes run it in training mode, where it moves the batch statistics. The student
answers to images and attack in two forwards, so that each has its own batch statistics.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field

import kdkit

from ._attacks import (
    AttackOptions,
    against_answers,
    against_labels,
    attacked,
    images_of,
)

VIEW = "attacked"


class AdversarialAlone(kdkit.Schedule):
    """One stage without a teacher: the student also answers to images that are changed against it.

    Losses see the answers to the images, or with `view: attacked` those to the attack. A step costs
    `steps` + 2 forwards and backwards of the student an image.
    """

    name = "adversarial_alone"
    scheme = "none"
    needs_teacher = False
    # the label that it attacks is that of an image
    tasks = frozenset({"classes of samples"})

    class Options(AttackOptions):
        """Strength of the attack."""

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            images = images_of(batch)
            with kdkit.in_eval_mode(student.module):
                changed = attacked(self.options, images, against_labels(student, batch.labels))
            return [kdkit.Lesson(student(images).seen_beside({VIEW: student(changed)}))]

        yield kdkit.Stage("train", [student], step)


class Adversarial(kdkit.Schedule):
    """One stage: a frozen teacher answers to the images, the student also to images that are
    changed against it.

    Losses see the answers to the images, or with `view: attacked` the student's to the attack
    beside the teacher's to the images. Several teachers are combined into one. A step costs a
    forward of each teacher and `steps` + 2 forwards and backwards of the student an image.
    """

    name = "adversarial"
    scheme = "offline"
    needs_teacher = True
    tasks = frozenset({"classes of samples"})

    class Options(AttackOptions):
        against: Literal["labels", "teacher"] = Field(
            default="labels",
            description=(
                "What the attack raises: the student's cross-entropy on the labels, or its KL"
                " divergence from the teacher's answer to the images."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student, teachers = models.student(), models.teachers()

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            images = images_of(batch)
            with torch.no_grad():
                answers = {name: model(batch.inputs).detach() for name, model in teachers.items()}
            taught = [*answers.values()]
            if len(taught) > 1:
                taught = [models.task.combined(taught)]
            harm = (
                against_labels(student, batch.labels)
                if self.options.against == "labels"
                else against_answers(student, taught[0].logits)
            )
            with kdkit.in_eval_mode(student.module):
                changed = attacked(self.options, images, harm)
            answer = student(images).seen_beside({VIEW: student(changed)})
            return [kdkit.Lesson(answer, taught, named=answers)]

        yield kdkit.Stage("distill", [student], step)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Adversarial, AdversarialAlone]
