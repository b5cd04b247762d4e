"""Pictures of two digits: their labels, and what they are made of."""

import torch
from kdkit_plugins.datasets.digits import Digits
from kdkit_plugins.datasets.two_digits import TwoDigits


def source(**options):
    return TwoDigits(TwoDigits.Options(**options))


def halves(part):
    return [half for picture in part.images[:, 0] for half in (picture[:, :8], picture[:, 8:])]


def trimmed(image):
    """The rows of an image without the empty ones above and below, which its place in a picture hides."""
    rows = image.any(1).nonzero().flatten()
    return tuple(map(tuple, image[rows[0] : rows[-1] + 1].tolist()))


def test_lengths_shapes_and_names_are_as_announced():
    found = source(train=30, test=20)
    info = found.info()
    assert (info.num_train, info.num_test, info.outputs, info.class_names) == (30, 20, 10, tuple("0123456789"))
    assert found.for_task(found.options) == "multilabel"
    for name, count in (("train", 30), ("test", 20)):
        part = found.split(name)
        assert part.images.shape == (count, *info.image_shape) and part.labels.shape == (count, 10)


def test_a_picture_s_labels_are_the_digits_in_it():
    for name in ("train", "test"):
        digits, part = Digits(Digits.Options()).split(name), source(train=40, test=40).split(name)
        known = {trimmed(image[0]): int(label) for image, label in zip(digits.images, digits.labels, strict=True)}
        found = [known[trimmed(half)] for half in halves(part)]
        wanted = torch.zeros(40, 10, dtype=torch.int64)
        wanted[torch.arange(40).repeat_interleave(2), torch.tensor(found)] = 1
        assert torch.equal(part.labels, wanted) and {1, 2} == set(part.labels.sum(1).tolist())


def test_a_seed_gives_the_pictures_and_no_other_does():
    first, again, other = (source(train=20, seed=seed).split("train") for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert len(first.images.flatten(1).unique(dim=0)) == 20


def test_digits_stand_at_every_height():
    part = source(train=300).split("train")
    tops = {int(half.any(1).nonzero()[0]) for half in halves(part)}
    assert tops >= set(range(9))
