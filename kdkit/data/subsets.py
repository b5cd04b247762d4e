"""Chooses images: subsets and validation images by class shares and seed, balanced epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkit.data.augment import bits, subseed
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return an order (N,) in which each prefix has the classes in about their proportions.

    The first K images are one of each of the K classes that occur; after them a class with n images
    puts its j-th one at (j + 1/2) / n of the way. A shorter subset is part of every longer one.
    """
    count = len(labels)
    if not count:
        return torch.empty(0, dtype=torch.int64)
    shuffled = bits(seed, 0, torch.arange(count), 1)[:, 0].argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(count) - starts[labels[by_class]]
    share = (rank.double() + 0.5) / sizes[labels[by_class]]
    share[rank == 0] -= 1  # the first of each class before all others
    position = torch.empty(count, dtype=torch.float64)
    position[by_class] = share
    return shuffled[position[shuffled].argsort(stable=True)]  # ties stay in random order


def choose(spec: DataSpec, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of training and validation images, ascending and disjoint.

    The validation images depend only on `data.validation` and `data.seed`, so subsets of several
    sizes share them.

    Raises:
        DataError: there are too few images, or none would be left.
    """
    total = len(labels)
    aside = validation_count(spec, total)
    # first, from all images: a smaller training subset must not change the validation images
    order = stratified_order(labels, subseed(spec.seed, "validation"))
    validation, rest = order[:aside].sort().values, order[aside:].sort().values
    count = len(rest)
    if spec.train_samples is not None:
        count = spec.train_samples
    elif spec.train_fraction is not None:
        count = max(1, round(spec.train_fraction * len(rest)))
    if count > len(rest):
        besides = f" beside {aside} for validation" if aside else ""
        raise DataError(
            f"data.train_samples: {count} asked for, but the training part has {len(rest)}"
            f" images{besides}"
        )
    chosen = rest[stratified_order(labels[rest], subseed(spec.seed, "train"))[:count]]
    return chosen.sort().values, validation


def balanced(shuffled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Draw N images from the classes in turn: their numbers and those of copies, (N,) each.

    Args:
        shuffled: the images' numbers in random order, (N,): the first ones of each class are taken,
            all of them before one comes again.
        labels: class of each image, (N,).
    """
    classes, label, sizes = torch.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_class, starts = shuffled[label.argsort(stable=True)], sizes.cumsum(0) - sizes
    positions = torch.arange(len(shuffled))
    chosen, turn = positions % len(classes), positions // len(classes)
    return by_class[starts[chosen] + turn % sizes[chosen]], turn // sizes[chosen]


def samples(spec: DataSpec, total: int) -> int:
    """Count the images out of `total` that are trained on; errors as in `choose`."""
    if spec.synthetic_batches is not None:
        return 0
    return len(choose(spec, torch.zeros(total, dtype=torch.int64))[0])


def images_per_epoch(spec: DataSpec, count: int) -> int:
    """Count the images that an epoch shows, repeated ones each time, if `count` are chosen; those
    without labels too.
    """
    if spec.synthetic_batches is not None:
        return spec.synthetic_batches * spec.batch_size
    whole = count // spec.labelled_size * spec.batch_size
    return whole if spec.drop_last else count


def validation_count(spec: DataSpec, total: int) -> int:
    """Count the images out of `total` that are held out; errors as in `choose`."""
    if spec.validation is None:
        return 0
    asked = spec.validation
    if asked >= 1 and asked != int(asked):
        raise DataError(
            f"data.validation: {asked} is neither a share below 1 nor a number of images"
        )
    # 1 is one image, not all of them
    count = max(1, round(asked * total)) if asked < 1 else int(asked)
    if count >= total:
        raise DataError(
            f"data.validation: {count} images asked for, but the training part has {total} and some"
            " must be left"
        )
    return count
