"""Teacher assistants: models of sizes in between hand the teacher's knowledge down to a student
that is much smaller.

Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh, "Improved Knowledge Distillation via
Teacher Assistant", AAAI 2020, arXiv:1902.03393 (TAKD): the teacher teaches the first assistant,
each assistant the next, the last one the student.

Son, Na, Choi, Hwang, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
ICCV 2021, arXiv:2009.08825 (DGKD), `dense: true`: each learns from the teacher and from all
assistants before it,

    total = ... + weight * sum_{m kept} loss(student, teacher m) / (number kept)

where `drop` leaves each of them out with that probability, anew for every batch (their stochastic
learning), but never all. The paper and the released code take the sum over the teachers, not the
mean; the code leaves out a fixed number of them.
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

import kdkit


class Assistants(kdkit.Schedule):
    """One stage for each assistant and one for the student: the teacher teaches the first, each
    of them the next, or all that follow.

    A finished assistant is frozen, with its averaged weights where `train.ema` averages. A step
    costs a forward and backward of the one that learns and a forward of its teacher an image
    (`dense`: of all before it). Memory holds all models' weights.
    """

    name = "assistants"
    scheme = "offline"
    needs_teacher = True
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        assistants: tuple[kdkit.ModelOptions, ...] = Field(
            min_length=1, description="The assistants, from the teacher's side on."
        )
        dense: bool = Field(
            default=False,
            description="All models before it teach a model, not only the last one (DGKD).",
        )
        drop: float = Field(
            default=0.0,
            ge=0,
            lt=1,
            description=(
                "dense: probability that a teacher is left out of a batch; one always stays."
            ),
        )
        epochs: int | None = Field(
            default=None,
            ge=1,
            description="Epochs of each assistant; none: `train.epochs`, as the student.",
        )

        @model_validator(mode="after")
        def _drops_some_of_several(self) -> "Assistants.Options":
            if self.drop and not self.dense:
                raise ValueError("drop leaves out some of several teachers: set `dense: true`")
            return self

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()  # the first, so that it begins as it would without assistants
        taught = [models.teacher()]
        for number, options in enumerate(self.options.assistants, 1):
            assistant = models.student(options)
            yield self.stage(f"assistant_{number}", assistant, taught, self.options.epochs)
            # frozen before the next stage begins: it does not change while it teaches
            taught.append(assistant.freeze())
        yield self.stage("student", student, taught, None)

    def stage(
        self, name: str, student: kdkit.Model, taught: Sequence[kdkit.Model], epochs: int | None
    ) -> kdkit.Stage:
        """One model learns from those before it."""
        by = list(taught if self.options.dense else taught[-1:])

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            with torch.no_grad():
                answers = [teacher(batch.inputs).detach() for teacher in by]
            kept = self.kept(len(by), batch.index.device)
            return [kdkit.Lesson(student(batch.inputs), answers, kept)]

        # a loss may look into one network: of several, the teacher's
        return kdkit.Stage(name, [student], step, epochs=epochs, teachers=by[:1])

    def kept(self, teachers: int, device: torch.device) -> Tensor | None:
        """1 for each teacher of a batch that is kept, 0 for the others."""
        if not self.options.drop or teachers == 1:
            return None
        draws = torch.rand(teachers, device=device)
        # the largest draw always stays, so that no batch is without a teacher
        return ((draws >= self.options.drop) | (draws == draws.max())).float()


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Assistants]
