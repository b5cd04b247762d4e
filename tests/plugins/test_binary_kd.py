import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

BinaryKD = registry.load().losses["binary_kd"]


def loss(**options):
    return BinaryKD(BinaryKD.Options(**options))


def formula(loss, student, teacher, batch):
    """One question at a time."""
    total, count = 0, 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        for c in range(len(z_s)):
            q = z_t[c].exp() / z_t.exp().sum() if loss.options.target == "softmax" else 1 / (1 + (-z_t[c]).exp())
            yes = 1 / (1 + (-z_s[c]).exp())
            weight = (yes - q).abs() ** loss.options.focal if loss.options.focal else 1
            total, count = total - weight * (q * yes.log() + (1 - q) * (1 - yes).log()), count + 1
    return total / count


@pytest.mark.parametrize("focal", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 3)])
def test_is_the_formula(size, classes, target, focal):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(target=target, focal=focal), formula, student, teacher, random_batch(size, classes))


def test_focal_by_hand():
    """Probabilities 1/2 and 3/4: a distance of 1/4 weighs log 2."""
    student, teacher = kdkit.Outputs(torch.zeros(1, 1)), kdkit.Outputs(torch.tensor([[math.log(3)]]))
    for focal, weight in ((0.0, 1), (1.0, 1 / 4), (2.0, 1 / 16)):
        assert loss(target="sigmoid", focal=focal)(student, teacher, random_batch(1)).item() == pytest.approx(weight * math.log(2))


def test_focal_leaves_equal_answers_alone():
    """The distance 0 has no slope, neither at exponent 1 nor above."""
    for focal in (1.0, 1.5):
        z = random_outputs(seed=1).logits.requires_grad_()
        value = loss(target="sigmoid", focal=focal)(kdkit.Outputs(z), random_outputs(seed=1), random_batch())
        value.backward()
        assert value.item() == 0 and not z.grad.any()


@pytest.mark.parametrize("focal", [0.5, 0.999, -1.0])
def test_refuses_exponents_below_1(focal):
    with pytest.raises(ValueError, match=r"at least 1|greater than"):
        BinaryKD.Options(focal=focal)


def test_the_sigmoid_target_is_met_by_the_teachers_logits():
    z = random_outputs(seed=1).logits.requires_grad_()
    loss(target="sigmoid")(kdkit.Outputs(z), random_outputs(seed=1), random_batch()).backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("focal", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
def test_opposed_logits_of_ten_thousand(target, focal):
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss(target=target, focal=focal)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == 1e4
    assert z.grad.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("focal", [0.0, 1.0])
@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
def test_gradient(target, focal):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(
        lambda z: loss(target=target, focal=focal)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z
    )


@pytest.mark.parametrize("focal", [0.0, 1.0])
def test_keeps_the_promises_for_labels_that_do_not_exclude_each_other(focal):
    check_loss(BinaryKD, target="sigmoid", focal=focal)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
