"""Schedules whose student learns from a bank of images that are made round by round."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

import kdkit

from ._synthesis import Every, Networks, moved

SHOWN = 64
"""Images in a picture."""


class Ring:
    """The last `capacity` rows that were added, on a device. They are saved with the run."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity, self.device = capacity, device
        self.rows: Tensor | None = None  # (capacity, ...), of which the first `count` are there
        self.count = self.place = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (N, ...), in place of the oldest ones if there is no room."""
        rows = rows[-self.capacity :]
        if self.rows is None:
            self.rows = rows.new_zeros((self.capacity, *rows.shape[1:]))
        places = (self.place + torch.arange(len(rows), device=rows.device)) % self.capacity
        self.rows[places] = rows
        self.place = (self.place + len(rows)) % self.capacity
        self.count = min(self.count + len(rows), self.capacity)

    def draw(self, count: int) -> Tensor:
        """Draw rows (count, ...) at random, each with replacement."""
        assert self.rows is not None and self.count, "nothing was added yet"
        return self.rows[torch.randint(self.count, (count,), device=self.rows.device)]

    def latest(self, count: int) -> Tensor:
        """Return the rows that were added last, at most `count`."""
        assert self.rows is not None
        count = min(count, self.count)
        places = (self.place - count + torch.arange(count, device=self.rows.device)) % self.capacity
        return self.rows[places]

    def state_dict(self) -> dict[str, Any]:
        rows = None if self.rows is None else self.rows[: self.count].clone()
        return {"rows": rows, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.count, self.place = None, 0, 0
        if (rows := state["rows"]) is not None:
            self.add(rows.to(self.device))
            self.place = state["place"]


class BankOptions(kdkit.ScheduleOptions):
    """Which images the student learns from."""

    images: int = Field(
        default=51_200,
        ge=1,
        le=10_000_000,
        description="Images in the bank, a byte a value; more replace the oldest ones.",
    )
    round_size: int = Field(
        default=256, ge=2, le=65_536, description="Images that are made in a round."
    )
    warmup: int = Field(
        default=20,
        ge=1,
        description=("Rounds before the first step, in which the student's answers do not count."),
    )
    every: int = Field(
        default=400, ge=1, description="Steps of the student from one round to the next."
    )
    shift: int = Field(
        default=4,
        ge=0,
        le=64,
        description="Largest random shift of an image in pixels, while it is made and learnt from.",
    )
    flip: float = Field(
        default=0.5, ge=0, le=1, description="Probability of a horizontal flip, likewise."
    )
    batch_norm: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the distance of the images' statistics from the batch norms'.",
    )
    one_hot: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the teacher's cross-entropy on the classes that are asked for.",
    )


class Synthesis(Protocol):
    """Makes images."""

    @property
    def keeps(self) -> Mapping[str, kdkit.Stateful]:
        """Its objects that change, by name; see `kdkit.Stage`."""
        ...

    def __call__(self, *, competing: bool) -> Tensor:
        """Make a round of images (N, C, H, W); `competing`: the student's answers count."""
        ...


class BankSchedule(kdkit.Schedule):
    """One stage; before every n-th step, a round of images goes into the bank."""

    scheme = "offline"
    needs_teacher = True
    needs_images = False
    tasks = frozenset({"classes"})
    taps: ClassVar[tuple[str, ...]] = ()

    options: BankOptions

    @abc.abstractmethod
    def synthesis(self, networks: Networks) -> Synthesis:
        """Set up what makes the images."""

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        o = self.options
        networks = Networks(models, self.taps, batch_norm=o.batch_norm > 0)
        make, due = self.synthesis(networks), Every(o.every)
        bank = Ring(o.images, networks.device)

        def prepare(batch: kdkit.Batch, moment: kdkit.Moment) -> kdkit.Batch:
            if due(moment.step):
                for _ in range(1 if moment.step else o.warmup):
                    bank.add(in_bytes(make(competing=moment.step > 0)))
            images = bank.draw(len(batch.index)).float() / 255
            return replace(batch, inputs=moved(images, shift=o.shift, flip=o.flip))

        yield kdkit.Stage(
            "train",
            [networks.student],
            kdkit.teach(networks.student, [networks.teacher]),
            prepare=prepare,
            keeps={**make.keeps, "bank": bank},
            pictures=lambda: {"bank": bank.latest(SHOWN).float() / 255} if bank.count else {},
        )


def in_bytes(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 0 to 255."""
    return images.detach().mul(255).round_().clamp_(0, 255).to(torch.uint8)
