import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

PLD = registry.load().losses["pld"]


def loss(**options):
    return PLD(PLD.Options(**options))


def formula(loss, student, teacher, batch):
    """Choice by choice."""
    total = 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes.tolist(), strict=True):
        q = (z_t / loss.options.temperature).exp() / (z_t / loss.options.temperature).exp().sum()
        others = sorted((c for c in range(len(z_t)) if c != label), key=lambda c, z_t=z_t: -z_t[c].item())
        order = [label, *others]
        for place, c in enumerate(order):
            total = total - q[c] * (z_s[c].exp() / sum(z_s[j].exp() for j in order[place:])).log()
    return total / len(batch.classes)


@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (32, 7)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_classes_are_the_weighted_cross_entropy():
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    assert loss()(student, teacher, random_batch(1)).item() == pytest.approx(0.75 * math.log(2))


def test_three_classes_by_hand():
    """The label, 0, then 2, then 1; the student's odds are 1 : 2 : 3."""
    z_s, z_t = torch.tensor([[1.0, 2, 3]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    value = loss()(kdkit.Outputs(z_s), kdkit.Outputs(z_t), random_batch(1, 3))
    assert value.item() == pytest.approx(-0.2 * math.log(1 / 6) - 0.5 * math.log(3 / 5))


def test_equal_logits_are_ranked_by_their_number():
    """By any other order of classes 1 to 4 the student's logits give another value."""
    student, batch = random_outputs(size=1), random_batch(1)
    equal, ranked = torch.zeros(1, 5), torch.tensor([[0.0, -1e-4, -2e-4, -3e-4, -4e-4]])
    value = loss()(student, kdkit.Outputs(equal), batch)
    torch.testing.assert_close(value, loss()(student, kdkit.Outputs(ranked), batch), rtol=1e-3, atol=0)
    reverse = loss()(student, kdkit.Outputs(-ranked), batch)
    assert (value - reverse).abs() > 0.01


def test_mixed_labels_count_as_their_largest_share():
    batch, student, teacher = random_batch(), random_outputs(), random_outputs(seed=1)
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss()(student, teacher, batch) == loss()(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


@pytest.mark.parametrize("margin", [100.0, 1e4])
def test_large_logits(margin):
    """The teacher is sure of the label, the student that it is class 1; the choices behind have no weight."""
    z = torch.tensor([[0.0, margin, 0.0]], requires_grad=True)
    value = loss()(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, 0.0, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(margin)
    torch.testing.assert_close(z.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_gradients_are_those_of_fp64_at_large_logits():
    found = []
    for dtype in (torch.float32, torch.float64):
        z = (1000 * random_outputs(classes=9).logits).to(dtype).requires_grad_()
        loss()(kdkit.Outputs(z), random_outputs(classes=9, seed=1).map(lambda x, dtype=dtype: x.to(dtype)), random_batch(6, 9)).backward()
        found.append(z.grad.double())
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_keeps_the_promises_with_options():
    check_but(PLD, temperature=4.0)
