import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

Bounded = registry.load().losses["bounded_regression"]


def loss(**options):
    return Bounded(Bounded.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample at a time."""
    total = 0 * student.logits.sum()
    for s, t, y in zip(student.logits, teacher.logits, batch.labels, strict=True):
        ours, theirs = (sum((z - target) ** 2 for z, target in zip(answer, y, strict=True)) for answer in (s, t))
        if ours + loss.options.margin > theirs:
            total = total + ours
    return total / len(batch.labels)


@pytest.mark.parametrize("margin", [0, 1.5])
@pytest.mark.parametrize("size", [1, 12])
def test_is_the_formula(size, margin):
    student, teacher = (random_outputs(size=size, classes=2, seed=seed) for seed in (0, 1))
    assert_agrees(loss(margin=margin), formula, student, teacher, random_batch(size, 2, rows="numbers"))


def test_a_student_that_beats_the_teacher_by_the_margin_is_let_go():
    """Squared errors 4 of the teacher, 1, 9 and 3 of the student: with a margin of 2 only 3 is not far enough below."""
    z = torch.tensor([[1.0], [3.0], [3**0.5]], requires_grad=True)
    y, teacher = torch.zeros(3, 1), torch.full((3, 1), 2.0)
    batch = kdkit.Batch(y, y, torch.arange(3))
    values = [loss(margin=margin)(kdkit.Outputs(z), kdkit.Outputs(teacher), batch) for margin in (0, 2)]
    assert [value.item() for value in values] == pytest.approx([9 / 3, 12 / 3])
    values[1].backward()
    assert z.grad[0] == 0 and z.grad[1] != 0


def test_refuses_other_numbers():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
