import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

NKD = registry.load().losses["nkd"]


def loss(**options):
    return NKD(NKD.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample and one class at a time."""
    t, total = loss.options.temperature, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        total = total - z_t.exp()[label] / z_t.exp().sum() * (z_s.exp()[label] / z_s.exp().sum()).log()
        others = [c for c in range(len(z_s)) if c != label]
        rest_s, rest_t = (sum((z[c] / t).exp() for c in others) for z in (z_s, z_t))
        for c in others:
            total = total - loss.options.gamma * t**2 * (z_t[c] / t).exp() / rest_t * ((z_s[c] / t).exp() / rest_s).log()
    return total / len(batch.classes)


@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"gamma": 0.0}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 7), (4, 2)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_mixed_labels_count_as_their_largest_share():
    batch, student, teacher = random_batch(), random_outputs(), random_outputs(seed=1)
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss()(student, teacher, batch) == loss()(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


def test_logits_of_ten_thousand():
    """The teacher is sure of the label, the student sure that it is class 1; the teacher tells no others apart."""
    z = torch.tensor([[0.0, 1e4, 0.0]], requires_grad=True)
    value = loss(gamma=1.0)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, 0.0, 0.0]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(1e4 + 0.5 * 1e4)
    torch.testing.assert_close(z.grad, torch.tensor([[-1.0, 1.5, -0.5]]))


def test_two_classes_leave_the_label():
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    assert loss()(student, teacher, random_batch(1)).item() == pytest.approx(0.75 * math.log(2))


def test_gradient():
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(temperature=2.0)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_keeps_the_promises_at_a_temperature():
    check_loss(NKD, temperature=4.0, gamma=1.0)


@pytest.mark.parametrize("classes", [(5, 7), (1, 1)])
def test_refuses_other_classes(classes):
    with pytest.raises(kdkit.ShapeError, match=rf"logits \(6, {classes[0]}\)"):
        loss().setup(*(random_outputs(classes=k) for k in classes))
