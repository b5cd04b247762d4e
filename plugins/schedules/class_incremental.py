"""Class-incremental learning: classes come in groups, and the network as it was before a group
keeps the student from forgetting the earlier ones.

Stage s trains on the images of its new classes alone. From the second stage on, the frozen student
of the stage before teaches: losses on responses compare the logits of the classes that it knows, z
restricted to the first K' of the K classes. Losses on labels compare those of the classes that the
stage shows, as in a head of its own: in a softmax over all, images of new classes alone would push
the others down. So the recipes are:

LwF: Li, Hoiem, "Learning without Forgetting", ECCV 2016, arXiv:1606.09282, equations 2 and 3:
`cross_entropy` and `logit_kl` with T = 2, whose weight is the paper's lambda. The paper is told in
the test which task a sample is of. Here all classes are told apart, as in later papers, which is
harder.

PODNet: Douillard, Cord, Ollion, Robert, Valle, "PODNet: Pooled Outputs Distillation for
Small-Tasks Incremental Learning", ECCV 2020, arXiv:2004.13513: `pod` on the stages of the network,
and `embedding` on what the classifier reads. The paper keeps 20 images of each earlier class
(`memory: 20`), chosen by herding and not, as here, the first ones; its classifier by cosines to
several proxies of a class, its growing weight and its balanced fine-tuning at the end of a stage
are left out.

Use no `label_smoothing`: it would ask for the hidden classes too. Without a loss that reads the
teacher it is plain fine-tuning, which forgets.
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

import kdkit

LOW = -1e4
"""Logit of a class that does not count: its probability is 0, also in half precision."""


class ClassIncremental(kdkit.Schedule):
    """Stages with new classes each: the student learns them, and the student of the stage before
    teaches it the earlier ones.

    Classes come in the order of their numbers. An epoch has as many images as the training part,
    those of the stage's classes several times. Each stage begins with the weights of the one
    before, has `train.epochs` epochs and a learning-rate schedule of its own; the last one's
    student is the result. After a stage, the balanced accuracy times K / K' is at least that on the
    K' classes so far: images of classes to come also count where they are guessed right. A step
    costs a forward and a backward an image, from the second stage on a forward more.
    """

    name = "class_incremental"
    scheme = "self"
    needs_teacher = False
    students_teach = True
    tasks = frozenset({"classes of samples"})

    class Options(kdkit.ScheduleOptions):
        stages: int = Field(default=2, ge=2, le=1000, description="Number of stages.")
        first: int | None = Field(
            default=None,
            ge=1,
            description="Classes of the first stage; none: as many as of the others.",
        )
        memory: int = Field(
            default=0,
            ge=0,
            description=(
                "Images of each earlier class that are kept and trained on in later stages: the"
                " first ones of the training part. Use it without `data.drop_last`, which leaves"
                " other images out in each epoch."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        ends = self.ends(models.info.outputs)
        earlier: kdkit.Model | None = None
        for number, (old, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            # a new one, so that losses are set up for the number of classes that the teacher knows
            student = models.student()
            if earlier is not None:
                student.module.load_state_dict(earlier.module.state_dict())
            yield kdkit.Stage(
                f"stage_{number}",
                [student],
                Step(student, earlier, old, shown=range(0 if self.options.memory else old, end)),
                arrange=Group(old, end, self.options.memory),
                teachers=[] if earlier is None else [earlier],
            )
            earlier = student.freeze()

    def ends(self, classes: int) -> list[int]:
        """Return how many classes have come after each stage.

        Raises:
            RunError: there is not one class for each stage.
        """
        stages = self.options.stages
        first = classes // stages if self.options.first is None else self.options.first
        if first < 1 or classes - first < stages - 1:
            raise kdkit.RunError(
                f"{classes} classes cannot come in {stages} stages, {first} in the first; each"
                " needs one"
            )
        return [first + (classes - first) * i // (stages - 1) for i in range(stages)]


class Step:
    """A teacher's answer over the first `old` classes, labels over those that are shown."""

    def __init__(
        self, student: kdkit.Model, teacher: kdkit.Model | None, old: int, shown: range
    ) -> None:
        self.student, self.teacher, self.old, self.shown = student, teacher, old, shown

    def __call__(self, batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
        answer = self.student(batch.inputs)
        if self.teacher is None:
            return [self.labelled(answer)]
        with torch.no_grad():
            taught = self.teacher(batch.inputs).detach()
        known = [kdkit.with_logits(each, each.logits[:, : self.old]) for each in (answer, taught)]
        return [kdkit.Lesson(known[0], known[1:], supervised=self.labelled(answer))]

    def labelled(self, answer: kdkit.Outputs) -> kdkit.Lesson:
        """The lesson of losses on labels."""
        # masked, not cut off: losses on labels expect a logit for each class
        classes = torch.arange(answer.logits.shape[1], device=answer.logits.device)
        hidden = (classes < self.shown.start) | (classes >= self.shown.stop)
        return kdkit.Lesson(kdkit.with_logits(answer, answer.logits.masked_fill(hidden, LOW)))


class Group:
    """Arrangement of an epoch that shows the images of classes `old` to `end` - 1, and the first
    `memory` images of each class before.
    """

    def __init__(self, old: int, end: int, memory: int) -> None:
        self.old, self.end, self.memory = old, end, memory

    def __call__(self, order: Tensor, classes: Tensor, batch_size: int) -> Tensor:
        """Return as many places as `order` has, each image as often as any other, but for one.

        Raises:
            RunError: no image is of these classes.
        """
        shown, by_place = (classes >= self.old) & (classes < self.end), order.argsort()
        for c in range(self.old if self.memory else 0):
            shown[by_place[classes[by_place] == c][: self.memory]] = True
        members = order[shown].sort().values
        if not len(members):
            raise kdkit.RunError(
                f"no training image is of the classes {self.old} to {self.end - 1}"
            )
        # `by_place` is a random permutation, as `order` is
        return members[by_place % len(members)]


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [ClassIncremental]
