"""Offline distillation: a teacher that was trained before and does not change.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; the name as in Gou et al.,
"Knowledge Distillation: A Survey", IJCV 2021, arXiv:2006.05525, section 3.1.
"""

from collections.abc import Iterator

import kdkit


class Offline(kdkit.Schedule):
    """One stage: the student learns from a frozen teacher."""

    name = "offline"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student()
        yield kdkit.Stage("distill", [student], kdkit.teach(student, by=[models.teacher()]))


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Offline]
