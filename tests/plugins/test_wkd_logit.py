import math

import pytest
import torch
from torch import nn

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

WKD = registry.load().losses["wkd_logit"]


def network(rows):
    """One that ends in a linear layer with these weights."""
    linear = nn.Linear(len(rows[0]), len(rows))
    linear.weight.data = torch.as_tensor(rows)
    return nn.Sequential(linear)


def wkd(size=6, classes=5, rows=None, **options):
    """The loss, set up, and what it compares."""
    loss = WKD(WKD.Options(**options))
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    rows = torch.randn(classes, 3, generator=torch.Generator().manual_seed(2)) if rows is None else rows
    context = kdkit.Context(network(rows), network(rows), classes, 0, torch.empty(0))
    loss.setup(student, teacher, context)
    return loss, student, teacher, random_batch(size, classes)


def plan(p, q, cost, regularization, iterations):
    """Sinkhorn's scaling of exp(-cost / regularization), without logarithms."""
    kernel = (-cost / regularization).exp()
    u = torch.ones_like(p) / len(p)
    for _ in range(iterations):
        v = q / (kernel.T @ u)
        u = p / (kernel @ v)
    return u[:, None] * kernel * v


def formula(loss, student, teacher, batch):
    """One sample at a time, the label's class cut out."""
    o, total = loss.options, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        total = total - z_t.exp()[label] / z_t.exp().sum() * (z_s.exp()[label] / z_s.exp().sum()).log()
        others = [c for c in range(len(z_s)) if c != label]
        cost = loss.cost[others][:, others]
        p, q = ((z[others] / o.temperature).exp() / (z[others] / o.temperature).exp().sum() for z in (z_s, z_t))
        total = total + o.gamma * (plan(p, q, cost, o.regularization, o.iterations) * cost).sum()
    return total / len(batch.classes)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"iterations": 1}, {"sharpness": 0.0}, {"regularization": 0.5, "iterations": 30, "gamma": 9.0}]
)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 7)])
def test_is_the_formula(size, classes, options):
    loss, *answers = wkd(size, classes, **options)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_the_cost_is_the_unlikeness_of_the_teachers_classes(sharpness):
    loss, *_ = wkd(classes=4, rows=[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], sharpness=sharpness)
    unlike = [[0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]]
    expected = [[1 - math.exp(-sharpness * d) if sharpness else d for d in row] for row in unlike]
    torch.testing.assert_close(loss.cost, torch.tensor(expected, dtype=torch.float))


def test_moving_to_a_like_class_costs_less():
    """The label is class 0; the teacher's other class is 1; class 2 is like it, class 3 is not."""
    loss, *_ = wkd(classes=4, rows=[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, -1.0, 0.0]], temperature=1.0)
    certain = [kdkit.Outputs(10.0 * torch.eye(4)[[c]]) for c in range(4)]
    same, like, unlike = (loss(certain[c], certain[1], random_batch(1)).item() for c in (1, 2, 3))
    assert same < like < unlike


def test_logits_of_ten_thousand_pay_the_cost():
    """All of the student's other probability is on class 1, all of the teacher's on class 2."""
    loss, *_ = wkd(classes=4, temperature=1.0)
    student, teacher = (torch.tensor([[0.0, *row]]) for row in ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]))
    z = student.requires_grad_()
    value = loss(kdkit.Outputs(z), kdkit.Outputs(teacher), random_batch(1))
    value.backward()
    torch.testing.assert_close(value, loss.cost[1, 2])
    assert z.grad.isfinite().all()


def test_two_classes_leave_the_label():
    loss, *_ = wkd(classes=2)
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    assert loss(student, teacher, random_batch(1)).item() == pytest.approx(0.75 * math.log(2))


def test_mixed_labels_count_as_their_largest_share():
    loss, student, teacher, batch = wkd()
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss(student, teacher, batch) == loss(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


def test_gradient():
    loss, student, teacher, batch = wkd(size=4)
    z = student.logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss.double()(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


@pytest.mark.parametrize("options", [{"temperature": 1.0, "iterations": 50}, {"sharpness": 0.0, "regularization": 0.025}])
def test_keeps_the_promises_with_options(options):
    check_loss(WKD, **options)


def test_opposed_classes_at_the_least_regularization():
    """Costs of 2 over 0.025: the kernel is exp(-80)."""
    rows = [[1.0], [1.0], [-1.0], [-1.0]]
    loss, *answers = wkd(classes=4, rows=rows, sharpness=0.0, regularization=0.025, temperature=1.0)
    assert_agrees(loss, formula, *answers)


def test_by_hand_it_asks_for_the_teacher():
    with pytest.raises(kdkit.ShapeError, match=r"give setup a kdkit\.Context"):
        WKD(WKD.Options()).setup(random_outputs(), random_outputs(seed=1))


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        WKD(WKD.Options()).setup(random_outputs(), random_outputs(classes=7))
    with pytest.raises(kdkit.ShapeError, match=r"classifier \(1, 2\).*\(6, 1\)"):
        wkd(classes=1, rows=[[1.0, 2.0]])
