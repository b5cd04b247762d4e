"""Training without a teacher: the baseline that every distilled student is measured against."""

from collections.abc import Iterator

import kdkit


class Supervised(kdkit.Schedule):
    """One stage: the student learns from the labels alone."""

    name = "supervised"
    scheme = "none"
    needs_teacher = False

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()
        yield kdkit.Stage("train", [student], kdkit.teach(student))


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Supervised]
