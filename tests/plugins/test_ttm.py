import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LOSSES = registry.load().losses
TTM, LogitKL = LOSSES["ttm"], LOSSES["logit_kl"]
OPTIONS = [{}, {"exponent": 0.5}, {"weighted": True}, {"exponent": 0.2, "weighted": True}, {"exponent": 3.0, "weighted": True}]


def loss(**options):
    return TTM(TTM.Options(**options))


def formula(loss, student, teacher, batch):
    """Powers of probabilities, one sample at a time."""
    o, total = loss.options, 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        p, q = (z.exp() / z.exp().sum() for z in (z_s, z_t))
        u = sum(x**o.exponent for x in q)
        soft = [x**o.exponent / u for x in q]
        value = sum(x * math.log(x / y) if not y.requires_grad else x * (x / y).log() for x, y in zip(soft, p, strict=True))
        total = total + (u if o.weighted else 1) * value
    return total / len(student.logits)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 10)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_classes_by_hand():
    """q = (0.9, 0.1); at exponent 1/2 it becomes (0.75, 0.25), and U = 0.9^0.5 + 0.1^0.5."""
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(9), 0.0]]))
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss(exponent=0.5)(student, teacher, random_batch(1)).item() == pytest.approx(wanted)
    value = loss(exponent=0.5, weighted=True)(student, teacher, random_batch(1))
    assert value.item() == pytest.approx((0.9**0.5 + 0.1**0.5) * wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_at_exponent_1_it_is_the_plain_divergence(weighted):
    answers = random_outputs(), random_outputs(seed=1), random_batch()
    plain = LogitKL(LogitKL.Options(temperature=1.0))(*answers)
    torch.testing.assert_close(loss(exponent=1.0, weighted=weighted)(*answers), plain)


def test_the_weight_lies_between_1_and_the_share_of_the_classes():
    """A teacher that is certain, and one that knows nothing."""
    student, batch = random_outputs(size=1), random_batch(1)
    for z, weight in ((torch.tensor([[1e4, 0, 0, 0, 0]]), 1.0), (torch.zeros(1, 5), 5**0.9)):
        one, other = (loss(weighted=weighted)(student, kdkit.Outputs(z), batch) for weighted in (False, True))
        torch.testing.assert_close(other, weight * one)


@pytest.mark.parametrize("weighted", [False, True])
def test_opposed_logits_of_ten_thousand(weighted):
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss(weighted=weighted)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert z.grad.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("options", [{"weighted": True}, {"exponent": 0.5}, {"exponent": 10.0, "weighted": True}])
def test_keeps_the_promises_with_options(options):
    check_but(TTM, **options)
