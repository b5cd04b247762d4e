"""Unlabelled samples beside the labelled ones in every training batch (`data.unlabelled`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Pairs, Stream, Texts
from kdkit.contracts.inputs import is_text
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.contracts.task import Task
from kdkit.data.augment import permutation, subseed
from kdkit.data.images import Images, Pictures, View
from kdkit.data.labels import Part
from kdkit.data.subsets import samples, validation_count
from kdkit.data.transforms import resized
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec


def described(spec: DataSpec, info: DataInfo, source: DatasetSource | None, task: Task) -> DataInfo:
    """Return the properties of the data with the number of unlabelled samples.

    Args:
        spec: the recipe's `data` section.
        info: of the labelled data, as batches have them.
        source: of the unlabelled samples (None: those that a subset leaves out, if any).
        task: of the recipe.

    Raises:
        DataError: there are none, or they do not fit the labelled ones.
    """
    if spec.unlabelled is None:
        return info
    assert (source is None) == (spec.unlabelled.dataset is None), "the dataset that it names"
    if not info.labelled:
        raise DataError(
            "no training sample has a label, so that there is only one kind; leave it out"
        )
    if source is None:
        left = info.num_train - validation_count(spec, info.num_train)
        return replace(info, unlabelled=_some(left - samples(spec, info.num_train)))
    other = source.info()
    _refuse_other_shape(spec, info, replace(other, image_shape=task.shape(other.image_shape)))
    return replace(info, unlabelled=_some(other.num_train))


def indexed(spec: DataSpec, info: DataInfo) -> int:
    """Count the samples that have a `Batch.index`: the whole training part, then those of another
    dataset.
    """
    is_other = spec.unlabelled is not None and spec.unlabelled.dataset is not None
    return info.num_train + (info.unlabelled if is_other else 0)


def _some(count: int) -> int:
    if not count:
        raise DataError(
            "there are none: `train_samples` or `train_fraction` leaves some out, or `dataset` has"
            " others"
        )
    return count


def _refuse_other_shape(spec: DataSpec, info: DataInfo, other: DataInfo) -> None:
    ours, theirs = info.image_shape, other.image_shape
    if is_text(ours) and is_text(theirs):
        known = info.tokenizer and other.tokenizer
        if info.further != other.further or (known and info.tokenizer != other.tokenizer):
            raise DataError("these texts are of other tokens than the labelled ones")
        if theirs[0] > ours[0]:
            raise DataError(f"texts of up to {theirs[0]} tokens; the labelled have {ours[0]}")
        return
    # `image_size` brings both to one size
    unlike = ours[0] != theirs[0] if spec.size else ours != theirs
    if len(ours) != len(theirs) or unlike:
        remedy = "" if ours[0] != theirs[0] else "; set data.image_size"
        raise DataError(f"samples of shape {theirs}; the labelled have {ours}{remedy}")


class _Both:
    """The samples of a part, then those of another one, read one by one.

    Only those in `known` have a target: that of the others is None.
    """

    labels: Sequence[Any] = ()

    def __init__(self, part: Pairs, other: Pairs | None, known: Tensor) -> None:
        self._part, self._other = part, other
        self._known = known

    def __len__(self) -> int:
        return len(self._part) + (0 if self._other is None else len(self._other))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self._other is not None and index >= len(self._part):
            return self._other[index - len(self._part)][0], None
        image, target = self._part[index]
        return image, target if self._known[index] else None


@dataclass(frozen=True)
class Whole:
    """Labelled and unlabelled samples of a recipe as one part of a dataset.

    Attributes:
        part: all samples there are; those of an unlabelled dataset come last.
        labels: their targets, -1 for unlabelled ones; None if they are read with the images.
        indices: places in `part` of the samples to train on, (N + M,), ascending.
        own: which of `indices` are labelled, (N,).
        others: which are not, (M,).
    """

    part: Pairs | InMemory | Texts
    labels: Tensor | None
    indices: Tensor
    own: Tensor
    others: Tensor


def join(
    spec: DataSpec,
    task: Task,
    part: Pairs | InMemory | Texts,
    other: Part | None,
    labels: Tensor | None,
    chosen: Tensor,
    aside: Tensor,
) -> Whole:
    """Join labelled and unlabelled samples to one part.

    Args:
        spec: the recipe's `data` section.
        task: of the recipe.
        part: has the labelled samples.
        other: the unlabelled ones (None: what is left of `part`).
        labels: of `part`; None if they are read with the images.
        chosen: places of the labelled samples in `part`, ascending.
        aside: places of those to validate on, which are not trained on.

    Raises:
        DataError: the unlabelled part can only be read from start to end; or the two do not fit.
    """
    is_free = torch.ones(len(part), dtype=torch.bool)
    is_free[chosen] = is_free[aside] = False
    whole = _joined(spec, part, other, ~is_free, moves=task.moves)
    left = is_free.nonzero()[:, 0]
    more = left if other is None else torch.arange(len(part), len(whole))
    if labels is not None:
        known = labels
        labels = known.new_full((len(whole), *known.shape[1:]), -1)
        labels[chosen] = known[chosen]
    indices = torch.cat([chosen, more]).sort().values
    own, others = torch.searchsorted(indices, chosen), torch.searchsorted(indices, more)
    return Whole(whole, labels, indices, own, others)


def _joined(
    spec: DataSpec,
    part: Pairs | InMemory | Texts,
    other: Part | None,
    known: Tensor,
    *,
    moves: bool,
) -> Pairs | InMemory | Texts:
    """Return the samples of both parts; those that are read one by one have targets if `known`."""
    if isinstance(other, Stream):
        raise DataError(
            "data.unlabelled: this dataset can only be read from start to end, and its samples are"
            " drawn"
        )
    if other is None and not moves:
        return part
    if isinstance(part, Texts) or isinstance(other, Texts):
        return _texts(part, other)
    if isinstance(part, InMemory) and isinstance(other, InMemory) and not moves:
        pair = [part.images, other.images]
        if pair[0].shape[1:] != pair[1].shape[1:]:
            pair = [resized(images, spec.size, spec.interpolation) for images in pair]
        # the labels of the whole are made by the caller
        return InMemory(torch.cat(pair), torch.zeros(len(part) + len(other)))
    return _Both(_read(part), None if other is None else _read(other), known)


def _texts(part: Any, other: Any) -> Texts:
    both_are = isinstance(part, Texts) and isinstance(other, Texts)
    if not both_are or set(part.tokens) != set(other.tokens):
        raise DataError("data.unlabelled: these samples have other tensors than the labelled ones")
    tokens = {name: [*ids, *other.tokens[name]] for name, ids in part.tokens.items()}
    return Texts(tokens, torch.zeros(len(part) + len(other)), part.padding)


def _read(part: Pairs | InMemory) -> Pairs:
    return Pictures(part) if isinstance(part, InMemory) else part


class Planned(Protocol):
    """Training batches whose images are known before they are made."""

    def __len__(self) -> int: ...

    def plan(
        self, number: int, start: int, view: int, arrange: Arrange | None
    ) -> tuple[list[Tensor], Sequence[View]]:
        """Return the numbers of the images of each batch, and their views."""
        ...


class Some:
    """Some of the images, under numbers of their own; see `kdkit.data.images.Images`."""

    def __init__(self, images: Images, numbers: Tensor) -> None:
        # empty if they are read with the images
        self.labels = images.labels[numbers] if len(images.labels) else images.labels
        self.indices = images.indices[numbers]
        self._images, self._numbers = images, numbers

    def batches(self, plan: Sequence[Tensor], views: Sequence[View | None]) -> Iterator[Batch]:
        return self._images.batches([self._numbers[chosen] for chosen in plan], views)


class BesideLoader:
    """Epochs of labelled images; in every batch, `size` unlabelled ones follow them.

    Those are drawn from one sequence, the unlabelled images in ever new random orders. Batch b of
    all batches of a stage takes U = `size` places of it from b U on, so that any batch can be made
    without those before it. An image that comes twice within an epoch comes in the same view.
    """

    indexed = True

    def __init__(
        self,
        labelled: Planned,
        images: Images,
        whole: Whole,
        size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.labels, self.indices = images.labels, images.indices
        self.num_samples = len(images.indices)
        self._labelled = labelled
        self._images, self._whole = images, whole
        self._size = size
        self._seed = subseed(seed, "unlabelled")
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._labelled)

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        if arrange is not None:
            raise DataError(
                "data.unlabelled: the schedule chooses which images come together; leave"
                " unlabelled out"
            )
        view = number if view is None else view
        plan, views = self._labelled.plan(number, start, view, arrange)
        whole, seen = list[Tensor](), list[View]()
        for own, more, each in zip(plan, self._unlabelled(number, start), views, strict=True):
            whole.append(torch.cat([self._whole.own[own], more]))
            seen.append(_with(each, len(more), view))
        for batch, own in zip(self._images.batches(whole, seen), plan, strict=True):
            yield replace(batch, labelled=len(own))

    def _unlabelled(self, number: int, start: int) -> list[Tensor]:
        """Return this process's share of the unlabelled images of each batch of an epoch."""
        size, count = self._size, len(self._whole.others)
        first, end = (number * len(self) + start) * size, (number + 1) * len(self) * size
        passes = range(first // count, -(-end // count))
        order = torch.cat([permutation(self._seed, one, count) for one in passes])
        order = order[first - passes.start * count :][: end - first]
        return [
            self._whole.others[batch.chunk(self._world)[self._rank]]
            for batch in torch.split(order, size)
        ]


def _with(views: View, count: int, view: int) -> View:
    """Return the views of labelled images, whose copies have views of their own, with those of
    `count` unlabelled ones.
    """
    return torch.cat([views, torch.full((count,), view)]) if isinstance(views, Tensor) else views
