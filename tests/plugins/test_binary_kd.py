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
            total, count = total - q * yes.log() - (1 - q) * (1 - yes).log(), count + 1
    return total / count


@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 3)])
def test_is_the_formula(size, classes, target):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(target=target), formula, student, teacher, random_batch(size, classes))


def test_the_sigmoid_target_is_met_by_the_teachers_logits():
    z = random_outputs(seed=1).logits.requires_grad_()
    loss(target="sigmoid")(kdkit.Outputs(z), random_outputs(seed=1), random_batch()).backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
def test_opposed_logits_of_ten_thousand(target):
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss(target=target)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == 1e4
    assert z.grad.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
def test_gradient(target):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(target=target)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_keeps_the_promises_for_labels_that_do_not_exclude_each_other():
    check_loss(BinaryKD, target="sigmoid")


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
