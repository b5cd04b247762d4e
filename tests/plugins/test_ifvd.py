from dataclasses import replace

import pytest
import torch
from naive_pixels import CLASSES, LARGER, OTHER, SAME, SMALLER, at_one_size, label_at, set_up, unit

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees

IFVD = registry.load().losses["ifvd"]


def formula(loss, student, teacher, batch):
    """Class by class, pixel by pixel."""
    total, count = 0, 0
    f_s, f_t = at_one_size(student, teacher)
    height, width = f_t.shape[2:]
    for number, labels in enumerate(batch.labels):
        places = [(row, column) for row in range(height) for column in range(width)]
        for k in range(CLASSES):
            own = [(row, column) for row, column in places if label_at(labels, row, column, (height, width)) == k]
            for row, column in own:
                pixels = [torch.stack([f[number, :, i, j] for i, j in own]) for f in (f_s, f_t)]
                here = own.index((row, column))
                cos_s, cos_t = ((unit(v[here]) * unit(v.mean(0))).sum() for v in pixels)
                total, count = total + (cos_s - cos_t) ** 2, count + 1
    return total / count


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shapes", [SAME, OTHER, SMALLER, LARGER], ids=str)
def test_is_the_formula(shapes, size):
    loss, *answers = set_up(IFVD, shapes, size=size)
    assert_agrees(loss, formula, *answers)


def test_pixels_that_do_not_count_change_nothing():
    """Neither their features nor their number: the mean is over the others."""
    loss, student, teacher, batch = set_up(IFVD, SAME, size=1)
    labels = torch.zeros(1, 4, 6, dtype=torch.long)
    labels[:, :, 3:] = 255
    wide = loss(student, teacher, replace(batch, labels=labels))
    narrow = loss(student.map(lambda f: f[..., :3]), teacher.map(lambda f: f[..., :3]), replace(batch, labels=labels[..., :3]))
    torch.testing.assert_close(wide, narrow)


def test_without_a_pixel_that_counts_it_is_zero():
    loss, student, teacher, batch = set_up(IFVD, SAME)
    f = student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, replace(batch, labels=torch.full_like(batch.labels, 255)))
    value.backward()
    assert value == 0 and not f.grad.any()


def test_the_classes_learn_through_their_means():
    """A pixel that is moved moves the cosines of the others of its class in the same image, and of no other pixel."""
    loss, student, teacher, batch = set_up(IFVD, SAME)
    labels = torch.zeros(2, 4, 6, dtype=torch.long)
    labels[:, 2:] = 1
    member = torch.stack([labels.flatten(1) == k for k in range(CLASSES)], 2).float()
    module = __import__(IFVD.__module__, fromlist=["cosines"])
    f = student.features["a"]
    moved = f.clone()
    moved[0, :, 0, 0] += 1
    changed = (module.cosines(f, member) != module.cosines(moved, member)).view(2, 4, 6)
    assert changed[0, :2].all() and not changed[0, 2:].any() and not changed[1].any()


def test_a_class_index_for_each_image_is_no_mask():
    loss, student, teacher, batch = set_up(IFVD, SAME)
    with pytest.raises(kdkit.ShapeError, match=r"labels \(2,\) are no masks \(B, H, W\)"):
        loss(student, teacher, replace(batch, labels=torch.tensor([0, 1])))


def test_without_a_context_the_answer_tells_the_classes():
    loss, student, teacher, batch = set_up(IFVD, SAME)
    alone = IFVD(loss.options)
    alone.setup(student, teacher)
    assert torch.equal(alone(student, teacher, batch), loss(student, teacher, batch))


def test_refuses_a_single_position():
    with pytest.raises(kdkit.ShapeError, match="has one position"):
        set_up(IFVD, ((3, 4, 4), (5, 1, 1)))
