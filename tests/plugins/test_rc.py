import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

RC = registry.load().losses["rc"]


def loss(**options):
    return RC(RC.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample at a time; the target is numbers, so that it has no gradient."""
    t, total = loss.options.temperature, 0
    for z, label in zip(student.logits, batch.labels.tolist(), strict=True):
        target = z.tolist()
        target[label] += max(*target, 0)
        exps = [math.exp(x / t) for x in target]
        p = (z / t).exp() / (z / t).exp().sum()
        total = total + sum(x / sum(exps) * (math.log(x / sum(exps)) - p[c].log()) for c, x in enumerate(exps))
    return t**2 * total / len(student.logits)


@pytest.mark.parametrize("temperature", [4.0, 1.0])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 7)])
def test_is_the_formula(size, classes, temperature):
    answers = random_outputs(size=size, classes=classes), random_outputs()
    assert_agrees(loss(temperature=temperature), formula, *answers, random_batch(size, classes))


def test_two_classes_by_hand():
    """The label's logit is raised from 0 to log 3: odds of 1 : 3 become 1 : 1."""
    z = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    value = loss(temperature=1.0)(kdkit.Outputs(z), random_outputs(), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    torch.testing.assert_close(z.grad, torch.tensor([[0.25 - 0.5, 0.75 - 0.5]]))


@pytest.mark.parametrize("z", [[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]], ids=str)
def test_a_label_is_never_lowered(z):
    """No logit is positive: the student agrees with its target, but for rounding."""
    z = torch.tensor([z], requires_grad=True)
    value = loss()(kdkit.Outputs(z), random_outputs(), random_batch(1))
    value.backward()
    assert value.item() == 0 and z.grad.abs().max() < 1e-6


def test_mixed_labels_raise_every_class_by_its_share():
    z = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5]])
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0]])
    batch = kdkit.Batch(random_batch(1).inputs, shares, torch.arange(1))
    target = z + 2 * shares
    wanted = 16 * (target / 4).softmax(1) @ ((target / 4).log_softmax(1) - (z / 4).log_softmax(1)).T
    torch.testing.assert_close(loss()(kdkit.Outputs(z), random_outputs(), batch), wanted[0, 0])


@pytest.mark.parametrize("z", [[1e4, -1e4], [-1e4, 1e4]], ids=str)
def test_logits_of_ten_thousand(z):
    z = torch.tensor([z], requires_grad=True)
    value = loss()(kdkit.Outputs(z), random_outputs(), random_batch(1))
    value.backward()
    assert value.isfinite() and z.grad.abs().max() <= 4


def test_keeps_the_promises_with_options():
    check_but(RC, temperature=1.0)


def test_refuses_another_number_of_classes():
    context = kdkit.Context(torch.nn.Identity(), None, num_classes=7, num_samples=1, labels=torch.zeros(1))
    with pytest.raises(kdkit.ShapeError, match=r"\(6, 5\).*\(B, 7\)"):
        loss().setup(random_outputs(), random_outputs(), context)
