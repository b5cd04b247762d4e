"""Route-constrained optimisation: the teacher as it was along its own training teaches in turn,
the trained one last.

Jin, Peng, Wu, Liu, Liu, Liang, Yan, Hu, "Knowledge Distillation via Route Constrained
Optimization", ICCV 2019, arXiv:1904.09149. The anchor points are epochs of the teacher's training,
at equal intervals or chosen by how much harder the next one is; here they are named. The teacher's
recipe keeps them by `run.snapshots: N`. Each stage goes on with the student and the losses' parts
of the one before it, with an optimizer and a learning-rate schedule of its own.
"""

from collections.abc import Iterator

from pydantic import Field, field_validator

import kdkit


class Rco(kdkit.Schedule):
    """One stage for each anchor, a snapshot of the teacher's training, and one for the trained
    teacher: the same student learns from all.

    A step costs a forward of the teacher and a forward and backward of the student an image, as
    offline distillation; with A anchors the whole takes A + 1 times `train.epochs`, or as `epochs`
    says. Memory holds the trained teacher and one snapshot.
    """

    name = "rco"
    scheme = "offline"
    needs_teacher = True

    class Options(kdkit.ScheduleOptions):
        anchors: tuple[int, ...] = Field(
            min_length=1,
            description="Epochs of the teacher's training whose snapshots teach, in order.",
        )
        epochs: int | None = Field(
            default=None,
            ge=1,
            description="Epochs with each snapshot; none: `train.epochs`, as with the teacher.",
        )

        @field_validator("anchors")
        @classmethod
        def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if value != tuple(sorted(set(value))) or value[0] < 1:
                raise ValueError("must be epochs in ascending order")
            return value

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()
        for epoch in self.options.anchors:
            # when its turn comes: memory holds one snapshot
            anchor = models.teacher(epoch=epoch)
            step = kdkit.teach(student, by=[anchor])
            yield kdkit.Stage(
                f"epoch_{epoch}", [student], step, epochs=self.options.epochs, teachers=[anchor]
            )
        yield kdkit.Stage("trained", [student], kdkit.teach(student, by=[models.teacher()]))


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Rco]
