"""Common part of schedules whose students are peers: who the peers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from kdkit.contracts.model_source import ModelOptions
from kdkit.contracts.schedule import Model, Models, ScheduleOptions


class PeerOptions(ScheduleOptions):
    """Options of a schedule of several students; subclass it as `Options` in the schedule."""

    size: int = Field(
        default=2,
        ge=2,
        le=64,
        description=(
            "Number of students that train together, each the recipe's `student` with its own"
            " random initial weights. (With a `checkpoint` or `pretrained`, only the remaining"
            " weights differ.)"
        ),
    )
    peers: tuple[ModelOptions, ...] = Field(
        default=(),
        description="Networks to train together with the recipe's `student`, instead of `size`.",
    )
    result: Literal["first", "best"] = Field(
        default="first",
        description=(
            "Student to export: the recipe's `student`, or the one that is best on"
            " `data.validation` at the end."
        ),
    )

    @model_validator(mode="after")
    def _counted_once(self) -> Self:
        if self.peers and "size" in self.model_fields_set and self.size != len(self.peers) + 1:
            raise ValueError(
                f"`peers` makes {len(self.peers) + 1} students, `size` says {self.size}; leave"
                " `size` out"
            )
        return self

    @property
    def count(self) -> int:
        """Number of students."""
        return len(self.peers) + 1 if self.peers else self.size

    def students(self, models: Models, taps: Sequence[str] = ()) -> list[Model]:
        """Build fresh students, the recipe's own first; `taps`: layers that the schedule reads."""
        others: Sequence[ModelOptions | None] = self.peers or (None,) * (self.size - 1)
        return [models.student(options, taps) for options in (None, *others)]
