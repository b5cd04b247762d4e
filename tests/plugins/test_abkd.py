import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

ABKD = registry.load().losses["abkd"]
PAIRS = [(0.8, 0.3), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.2, 0.7), (0.3, 0.0), (0.0, 0.3), (0.0, 0.0), (2.0, 1.5)]


def loss(alpha, beta, temperature=4.0):
    return ABKD(ABKD.Options(alpha=alpha, beta=beta, temperature=temperature))


def divergence(p, q, a, b):
    """Of two probabilities, with the limits written out."""
    if a == b == 0:
        return (q.log() - p.log()) ** 2 / 2
    if b == 0:
        return (q**a * (q**a / p**a).log() - q**a + p**a) / a**2
    if a == 0:
        return (p**b * (p**b / q**b).log() - p**b + q**b) / b**2
    return -(q**a * p**b - a / (a + b) * q ** (a + b) - b / (a + b) * p ** (a + b)) / (a * b)


def formula(loss, student, teacher, batch):
    """One class at a time."""
    o, total = loss.options, 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        p, q = ((z / o.temperature).exp() / (z / o.temperature).exp().sum() for z in (z_s, z_t))
        total = total + sum(divergence(*both, o.alpha, o.beta) for both in zip(p, q, strict=True))
    return total / len(student.logits)


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
@pytest.mark.parametrize(("size", "classes", "temperature"), [(1, 5, 1.0), (2, 3, 1.0), (8, 5, 2.0)])
def test_is_the_formula(size, classes, temperature, alpha, beta):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(alpha, beta, temperature), formula, student, teacher, random_batch(size, classes))


def test_known_divergences_by_hand():
    """q = (3/4, 1/4), p = (1/2, 1/2)."""
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    wanted = {
        (1, 0): 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        (0, 1): 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        (0.5, 0.5): 2 * ((0.75**0.5 - 0.5**0.5) ** 2 + (0.25**0.5 - 0.5**0.5) ** 2),
        (1, 1): ((0.75 - 0.5) ** 2 + (0.25 - 0.5) ** 2) / 2,
        (0, 0): (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 2,
    }
    for (alpha, beta), value in wanted.items():
        assert loss(alpha, beta, 1.0)(student, teacher, random_batch(1)).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("near", "limit"),
    [((0.7, 1e-5), (0.7, 0)), ((1e-5, 0.7), (0, 0.7)), ((1, 1e-6), (1, 0)), ((2e-3, 0), (0, 0)), ((1e-3, 1e-3), (0, 0))],
)
def test_nothing_jumps_where_an_exponent_vanishes(near, limit):
    """In fp32, with gradients."""
    answers, found = (random_outputs(seed=1), random_batch()), []
    for exponents in (near, limit):
        z = random_outputs().logits.requires_grad_()
        value = loss(*exponents, 1.0)(kdkit.Outputs(z), *answers)
        found.append((value.detach(), *torch.autograd.grad(value, z)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_equal_answers_are_at_the_minimum(alpha, beta):
    z = random_outputs().logits.requires_grad_()
    value = loss(alpha, beta)(kdkit.Outputs(z), random_outputs(), random_batch())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-7) and z.grad.abs().max() < 1e-6
    assert loss(alpha, beta)(random_outputs(), random_outputs(seed=1), random_batch()) > 0


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_opposed_logits_of_ten_thousand(alpha, beta):
    """One power is 1 and the other 0: 1 / (b (a + b)) + 1 / (a (a + b)) = 1 / (a b); the limits grow with the gap."""
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss(alpha, beta, 1.0)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert z.grad.isfinite().all()
    if alpha and beta:
        assert value.item() == pytest.approx(1 / (alpha * beta))
    else:
        of_one = alpha or beta
        assert value.item() == pytest.approx(2e4 / of_one if of_one else 4e8, rel=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (2.0, 1.5)])
def test_keeps_the_promises_with_options(alpha, beta):
    # of log-probabilities alone, every class counts alike, also an impossible one
    but = ["check_says_its_reduction"] if alpha == beta == 0 else []
    check_but(ABKD, *but, alpha=alpha, beta=beta, temperature=1.0)


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": -0.1}, {"beta": {"from": 0.5, "to": -0.5, "epochs": 2}}])
def test_refuses_negative_exponents(options):
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        ABKD.Options(**options)
