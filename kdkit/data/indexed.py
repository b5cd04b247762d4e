"""Loaders of images with random access: which ones, in which order and view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.contracts.task import Task
from kdkit.data.augment import permutation, subseed
from kdkit.data.images import Images, View
from kdkit.data.subsets import balanced
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec

MOST_VIEWS = 1 << 40
"""Copy c of a repeated image has views from c * 2^40 on, beyond a stage's further views."""


class ShuffledLoader:
    """Epochs over images with random access.

    With `data.repeats` R, position p of an epoch shows image p // R of its order, as copy p % R,
    each in a view of its own (Hoffer et al. 2020; timm's RepeatAugSampler): an epoch keeps its
    length, and shows an R-th of the images. With `data.sampling: balanced`, the classes come
    equally often, and the copies of an image are views of their own too.
    """

    indexed = True

    def __init__(
        self, images: Images, task: Task, spec: DataSpec, seed: int, rank: int, world: int
    ) -> None:
        self.labels = images.labels
        self._groups = None if task.moves else task.strata(images.labels)
        if self._groups is None and spec.repeating == "sampling":
            raise DataError(
                f"data.sampling: targets of task '{task.name}' make no groups to balance"
            )
        self.indices = images.indices
        self.num_samples = len(images.indices)
        self._images = images
        self._seed = seed
        self._rank = rank
        self._world = world
        self._batch_size = spec.labelled_size
        self._repeats = spec.repeats
        self._repeating = spec.repeating
        # every process has a share of the last batch too, of equal size
        unit = spec.labelled_size if spec.drop_last else world
        self._used = self.num_samples - self.num_samples % unit

    def __len__(self) -> int:
        return -(-self._used // self._batch_size)

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        plan, views = self.plan(number, start, number if view is None else view, arrange)
        return self._images.batches(plan, views)

    def plan(
        self, number: int, start: int, view: int, arrange: Arrange | None
    ) -> tuple[list[Tensor], Sequence[View]]:
        """Return the numbers of the images of each of this process's batches, and their views."""
        if arrange is not None and self._repeating:
            raise DataError(
                f"data.{self._repeating}: the schedule chooses which images come together; leave"
                f" {self._repeating} out"
            )
        order, copies = self._draw(number)
        if arrange is not None:
            if self._groups is None:
                raise DataError("the schedule brings samples together that the task does not group")
            order = arrange(order, self._groups.to(order.device)[order], self._batch_size)
            # steps and checkpoints count on it
            assert len(order) == self._used, "an arrangement keeps the number of images"
        plan = self._shares(order, start)
        views: Sequence[View] = [view] * len(plan)
        # each copy in a view of its own, or an image would come twice the same
        if self._repeating:
            views = self._shares(view + copies * MOST_VIEWS, start)
        return plan, views

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Draw the image at each place of an epoch, and the number of its copy, both (used,)."""
        shuffled = permutation(self._seed, number, self.num_samples)
        if self._repeating == "sampling" and self._groups is not None:
            order, copies = balanced(shuffled, self._groups.to(shuffled.device))
            # `order` has the classes in turn; a batch is to be a random sample
            mixed = permutation(subseed(self._seed, "balanced"), number, self.num_samples)
            mixed = mixed[: self._used]
            return order[mixed], copies[mixed]
        positions = torch.arange(self._used)
        return shuffled[positions // self._repeats], positions % self._repeats

    def _shares(self, whole: Tensor, start: int) -> list[Tensor]:
        """Return this process's share of every batch, a contiguous slice."""
        batches = torch.split(whole, self._batch_size)[start:]
        # copies of one image go to different processes, as in timm
        if self._repeats > 1:
            return [batch[self._rank :: self._world] for batch in batches]
        return [batch.chunk(self._world)[self._rank] for batch in batches]


class OrderedLoader:
    """Every image once, in order, without augmentation."""

    def __init__(self, images: Images, batch_size: int, rank: int, world: int) -> None:
        self.num_samples = len(images.indices)
        # a process without images would have no score to contribute
        if self.num_samples < world:
            raise DataError(
                f"{self.num_samples} images to measure on cannot be shared by {world} processes"
            )
        self._images, self._batch_size = images, batch_size
        # no image twice: padding to equal shares would count some of them twice in a score
        own = torch.arange(rank, self.num_samples, world)
        self._plan: Sequence[Tensor] = torch.split(own, batch_size) if len(own) else ()

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        return self._images.batches(self._plan, [None] * len(self._plan))

    def whole(self) -> OrderedLoader:
        return OrderedLoader(self._images, self._batch_size, rank=0, world=1)
