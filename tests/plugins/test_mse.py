"""Losses of numbers on their targets: `mse` and `smooth_l1`."""

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LOSSES = registry.load().losses


def loss(name, **options):
    cls = LOSSES[name]
    return cls(cls.Options(**options))


def formula(loss, student, teacher, batch):
    """One number at a time."""
    total = 0
    for answer, target in zip(student.logits, batch.labels, strict=True):
        for d in (answer - target).abs():
            if loss.name == "mse":
                total = total + d * d
            else:
                beta = loss.options.beta
                total = total + (d * d / (2 * beta) if d < beta else d - beta / 2)
    return total / student.logits.numel()


@pytest.mark.parametrize(("name", "options"), [("mse", {}), ("smooth_l1", {}), ("smooth_l1", {"beta": 0.3}), ("smooth_l1", {"beta": 0})])
@pytest.mark.parametrize("size", [1, 9])
def test_is_the_formula(name, options, size):
    batch = random_batch(size, 2, rows="numbers")
    assert_agrees(loss(name, **options), formula, random_outputs(size=size, classes=2), random_outputs(), batch)


@pytest.mark.parametrize("name", ["mse", "smooth_l1"])
def test_refuses_other_numbers(name):
    context = kdkit.Context(torch.nn.Identity(), None, outputs=3, num_samples=0, labels=torch.zeros(0, 3))
    with pytest.raises(kdkit.ShapeError, match=r"student answers \(6, 5\) do not fit the targets, which need \(B, 3\)"):
        loss(name).setup(random_outputs(), random_outputs(), context)
