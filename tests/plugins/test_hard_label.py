import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

HardLabel = registry.load().losses["hard_label"]


def loss():
    return HardLabel(HardLabel.Options())


def formula(loss, student, teacher, batch):
    """The probability of the class with the largest teacher logit, one sample at a time."""
    total = 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        best = max(range(len(z_t)), key=lambda c: z_t[c].item())
        total = total - (z_s.exp()[best] / z_s.exp().sum()).log()
    return total / len(student.logits)


@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 10)])
def test_is_the_formula(size, classes):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(), formula, student, teacher, random_batch(size, classes))


def test_only_the_teachers_decision_counts():
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    value = loss()(student, teacher, batch)
    assert value == loss()(student, teacher.map(lambda z: 100 * z - 3), batch)
    assert value == loss()(student, teacher, kdkit.Batch(batch.inputs, batch.labels.roll(1), batch.index))


def test_opposed_logits_of_ten_thousand():
    z = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss()(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[0.0, 1.0, 0.0]])), random_batch(1))
    value.backward()
    assert value.item() == 2e4
    assert z.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_equal_logits_cost_the_log_of_the_classes():
    assert loss()(kdkit.Outputs(torch.zeros(3, 7)), random_outputs(size=3, classes=7), random_batch(3)).item() == pytest.approx(math.log(7))


def test_gradient():
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss()(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
