"""Offline distillation in several stages, each with its own losses, epochs, learning rate and
parts that learn.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, section 2.3: first
the hint layers, then the whole network. Activation boundaries (AB), factor transfer (FT) and FSP
begin with a stage of their own too.
"""

from collections.abc import Callable, Iterator

from pydantic import Field, model_validator
from torch import Tensor

import kdkit


class StagePlan(kdkit.Options):
    """One stage."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What the logs call it.")
    losses: tuple[str, ...] | dict[str, float] | None = Field(
        default=None,
        description=(
            "Names of the losses that count; a mapping gives them other weights than the recipe's;"
            " none: all of them."
        ),
    )
    epochs: int | None = Field(default=None, ge=1, description="Epochs; none: `train.epochs`.")
    lr: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate before its schedule; none: `train.optimizer.lr`.",
    )
    train: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "What learns: `student`, a layer of it (`student.stage1`), a loss's parts by its name"
            " (`hint`, `ft.paraphrasers`); none: everything."
        ),
    )


class Staged(kdkit.Schedule):
    """Several stages: the student learns from a frozen teacher, by other losses in each stage."""

    name = "staged"
    scheme = "offline"
    needs_teacher = True

    class Options(kdkit.ScheduleOptions):
        stages: tuple[StagePlan, ...] = Field(
            min_length=1,
            description="The stages in order; a loss keeps what it learnt in earlier ones.",
        )
        turned: bool = Field(
            default=False,
            description=(
                "Also show each image turned by 90, 180 and 270 degrees, to losses that ask for it."
            ),
        )
        second: bool = Field(
            default=False,
            description="Also show each image in a second augmentation, to losses that ask for it.",
            json_schema_extra={"later": True},
        )

        @model_validator(mode="after")
        def _names_differ(self) -> "Staged.Options":
            if len({stage.name for stage in self.stages}) < len(self.stages):
                raise ValueError("two stages have one name")
            return self

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student, teacher = models.student(), models.teacher()
        # one step for all stages, which differ in losses and in what learns
        step = kdkit.teach(student, by=[teacher], views=self.views())
        for plan in self.options.stages:
            yield kdkit.Stage(
                plan.name,
                [student],
                step,
                losses=plan.losses,
                epochs=plan.epochs,
                lr=plan.lr,
                train=plan.train,
                views=2 if self.options.second else 1,
            )

    def views(self) -> dict[str, Callable[[kdkit.Batch], Tensor]]:
        """Further views of a batch's images, by name."""
        known: dict[str, Callable[[kdkit.Batch], Tensor]] = {
            "turned": kdkit.turned,
            "second": second,
        }
        return {name: view for name, view in known.items() if getattr(self.options, name)}


def second(batch: kdkit.Batch) -> Tensor:
    """Images in their second augmentation."""
    images = batch.views[0]
    if not isinstance(images, Tensor):
        raise kdkit.ShapeError("only images have a second augmentation")
    return images


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Staged]
