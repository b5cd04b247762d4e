"""The digits come whole, split once and for all, in class shares."""

import torch
from kdkit_plugins.datasets.digits import Digits
from sklearn.datasets import load_digits


def parts():
    source = Digits(Digits.Options())
    return source.info(), source.split("train"), source.split("test")


def test_lengths_and_shapes_are_as_announced():
    info, train, test = parts()
    assert (len(train), len(test)) == (info.num_train, info.num_test) == (1000, 797)
    assert train.images.shape[1:] == test.images.shape[1:] == info.image_shape
    assert info.num_classes == len(info.class_names) == 10


def test_the_parts_together_are_scikit_learns_images():
    _, train, test = parts()
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((label, *(round(p * 255 / 16) for p in row)) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    images, classes = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    assert sorted((c, *row) for row, c in zip(images.flatten(1).tolist(), classes.tolist(), strict=True)) == expected


def test_both_parts_have_the_class_shares():
    _, train, test = parts()
    whole = torch.cat([train.labels, test.labels]).bincount()
    for part in (train, test):
        assert float((part.labels.bincount() - whole * len(part) / 1797).abs().max()) <= 1


def test_the_split_is_always_the_same():
    _, train, test = parts()
    again = parts()
    assert torch.equal(train.images, again[1].images) and torch.equal(test.labels, again[2].labels)
    assert not torch.equal(train.labels[:100], train.labels[:100].sort().values)  # in the order of the file, not of the classes
