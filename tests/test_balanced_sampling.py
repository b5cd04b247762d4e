"""`data.sampling: balanced`: the classes come equally often, whatever their sizes."""

import pytest
import torch
from test_data import CLASSES, CROPS, KINDS, Held, data, every_kind, random_images, same, spec

from kdkit.contracts.dataset_source import InMemory
from kdkit.data.subsets import balanced
from kdkit.errors import DataError

SIZES = (28, 9, 2, 1)


class Unequal(Held):
    """40 images, of four classes of 28, 9, 2 and 1."""

    def split(self, part):
        count = getattr(self, part)
        labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(SIZES))[:count]
        return InMemory(random_images(count, self.channels, seed=len(part)), labels)


def indices(batches):
    return torch.cat([batch.index for batch in batches])


def test_balanced_sampling_takes_each_class_equally_often():
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(SIZES))
    order, copies = balanced(torch.randperm(40, generator=torch.Generator().manual_seed(0)), labels)
    assert labels[order].bincount().tolist() == [10] * CLASSES
    for label, size in enumerate(SIZES):
        times = order[labels[order] == label].bincount(minlength=40)[labels == label]
        assert times.max() - times.min() <= 1 and int(times.sum()) == 10, size
    assert len(set(zip(order.tolist(), copies.tolist(), strict=True))) == 40  # no copy twice


@pytest.mark.parametrize("labels", [[0] * 6, [2, 2, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5]], ids=["one class", "two", "as many as images"])
def test_balanced_sampling_leaves_out_classes_that_do_not_occur(labels):
    labels = torch.tensor(labels)
    order, _ = balanced(torch.arange(6), labels)
    _, counts = labels[order].unique(return_counts=True)
    assert counts.max() - counts.min() <= 1 and len(order) == 6


def test_a_balanced_epoch_keeps_its_length_and_differs_from_the_next():
    loaded = data(Unequal, augment=CROPS, sampling="balanced")
    first, second = indices(loaded.train.epoch(0)), indices(loaded.train.epoch(1))
    assert len(first) == len(second) == 40 and len(loaded.train) == 5
    assert loaded.train.labels[first].bincount().tolist() == [10] * CLASSES
    assert sorted(first.tolist()) != sorted(second.tolist())  # other images of the large class
    assert same(loaded.train.epoch(1), data(Unequal, augment=CROPS, sampling="balanced").train.epoch(1))


def test_balanced_copies_of_an_image_are_augmented_differently():
    batches = list(data(Unequal, augment=CROPS, sampling="balanced").train.epoch(0))
    pictures = torch.cat([batch.inputs for batch in batches])[indices(batches) == 39]  # the only image of its class
    assert len(pictures) == 10 and len(pictures.flatten(1).unique(dim=0)) > 5


@every_kind
def test_processes_share_a_balanced_batch_and_resume(kind):
    source, settings = KINDS[kind]
    settings = {**settings, "sampling": "balanced"}
    whole = list(data(source, **settings).train.epoch(3))
    ranks = [list(data(source, rank=rank, world=2, **settings).train.epoch(3)) for rank in range(2)]
    assert [batch.index.tolist() for batch in whole] == [
        torch.cat([part.index for part in parts]).tolist() for parts in zip(*ranks, strict=True)
    ]
    assert same(whole[2:], data(source, **settings).train.epoch(3, start=2))


def test_balanced_sampling_is_refused_where_it_cannot_work():
    with pytest.raises(ValueError, match="give repeats or sampling: balanced, not both"):
        spec(sampling="balanced", repeats=2, augment=CROPS)
    with pytest.raises(DataError, match=r"data\.sampling: the schedule chooses which images come together"):
        data(Unequal, sampling="balanced").train.epoch(0, arrange=lambda order, labels, size: order)
