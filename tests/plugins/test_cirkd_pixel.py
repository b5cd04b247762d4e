import sys

import pytest
import torch
from naive_pixels import LARGER, OTHER, SAME, SMALLER, at_one_size, kl, set_up, unit

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees

CIRKD = registry.load().losses["cirkd_pixel"]
PIXELS = sys.modules[CIRKD.forward.__globals__["Divergence"].__module__]


def formula(loss, student, teacher, batch):
    """A pair of images at a time, a row at a time."""
    k, t = loss.options.pool, loss.options.temperature
    images = []
    for f in at_one_size(student, teacher):
        height, width = f.shape[2:]
        images.append(
            [[unit(image[:, i : i + k, j : j + k].mean((1, 2))) for i in range(0, height, k) for j in range(0, width, k)] for image in f]
        )
    students, teachers = images
    total, count = 0, len(students)
    for i in range(count):
        for j in range(count):
            rows = [[torch.stack([(row * other).sum() for other in of[j]]) / t for row in of[i]] for of in (students, teachers)]
            total = total + torch.stack([kl(z_t, z_s) for z_s, z_t in zip(*rows, strict=True)]).mean()
    return total / count**2


@pytest.mark.parametrize(
    ("shapes", "size", "options"),
    [
        (SAME, 1, {}),
        (OTHER, 2, {}),
        (SMALLER, 3, {"temperature": 0.5}),
        (LARGER, 2, {"pool": 2}),
        (OTHER, 2, {"pool": 3, "temperature": 1.0}),
    ],
    ids=str,
)
def test_is_the_formula(shapes, size, options):
    loss, *answers = set_up(CIRKD, shapes, size=size, **options)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("most", [1, 200])
def test_chunks_of_rows_change_nothing(most, monkeypatch):
    """A row at a time, and seven, of 27."""
    loss, student, teacher, batch = set_up(CIRKD, ((3, 3, 3), (5, 3, 3)), size=3)
    found = []
    for chunk in (10**6, most):
        monkeypatch.setattr(PIXELS, "MOST_SIMILARITIES", chunk)
        f = student.features["a"].clone().requires_grad_()
        value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
        value.backward()
        found.append((value.detach(), f.grad))
    torch.testing.assert_close(*found)


def test_gradient():
    loss, student, teacher, batch = set_up(CIRKD, OTHER, temperature=0.5)
    teacher = teacher.map(torch.Tensor.double)
    f = student.features["a"].double()[:, :, :2, :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize(("shapes", "pool"), [(((3, 4, 4), (5, 1, 1)), 1), (OTHER, 7)])
def test_refuses_a_single_position(shapes, pool):
    with pytest.raises(kdkit.ShapeError, match="has one position"):
        set_up(CIRKD, shapes, pool=pool)
