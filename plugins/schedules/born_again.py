"""Born-again networks: generations of one architecture, each taught by the one before.

Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born Again Neural Networks", ICML 2018,
arXiv:1805.04770, section 3. The first generation learns from the labels, generation g from the
frozen generation g - 1, each from an initialisation of its own; the ensemble of all of them
(section 3.1) is measured. What a generation learns by is the recipe's losses: `logit_kl` with or
without `cross_entropy`; the paper's "born-again" variant without labels is `logit_kl` alone in the
later generations, `first: [cross_entropy]` in the first.
"""

from collections.abc import Iterator

from pydantic import Field

import kdkit


class BornAgain(kdkit.Schedule):
    """Generations: a fresh student learns from the one trained before it, the first from the
    labels.

    In the first generation only losses on labels count, for want of a teacher. The last generation
    is the result. A step of the first costs a forward and a backward an image, of each later one a
    forward more; all generations' weights stay in memory, and generation g is measured together
    with the g - 1 before it.
    """

    name = "born_again"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        generations: int = Field(
            default=3,
            ge=2,
            le=100,
            description="How many students are trained, the first included.",
        )
        first: tuple[str, ...] | dict[str, float] | None = Field(
            default=None,
            description=(
                "Losses of the first generation; a mapping gives them other weights than the"
                " recipe's; none: all on labels."
            ),
        )
        later: tuple[str, ...] | dict[str, float] | None = Field(
            default=None,
            description="Losses of the later generations, likewise; none: all of them.",
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        earlier: list[kdkit.Model] = []
        for generation in range(1, self.options.generations + 1):
            # a new one each time: each generation has an initialisation of its own
            student = models.student()
            step = kdkit.teach(student, by=earlier[-1:])
            losses = self.options.later if earlier else self.options.first
            name = f"generation_{generation}"
            yield kdkit.Stage(
                name,
                [student],
                step,
                losses=losses,
                company=tuple(earlier),
                teachers=tuple(earlier[-1:]),
            )
            # frozen: it teaches the next generation, and is measured in its ensemble
            earlier.append(student.freeze())


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [BornAgain]
