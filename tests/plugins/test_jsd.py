import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

JSD = registry.load().losses["jsd"]
LogitKL = registry.load().losses["logit_kl"]


def loss(**options):
    return JSD(JSD.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample at a time."""
    b, t, total = loss.options.beta, loss.options.temperature, 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        p, q = ((z / t).exp() / (z / t).exp().sum() for z in (z_s, z_t))
        m = (1 - b) * p + b * q
        if b == 0:
            total = total + (q * (q / p).log()).sum()
        elif b == 1:
            total = total + (p * (p / q).log()).sum()
        else:
            total = total + b * (q * (q / m).log()).sum() + (1 - b) * (p * (p / m).log()).sum()
    return total / len(student.logits)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1, "temperature": 3.0}, {"beta": 0.999}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 10)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_the_ends_are_the_divergences_of_either_direction():
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    kl = LogitKL(LogitKL.Options(temperature=1.0))
    torch.testing.assert_close(loss(beta=0.0)(student, teacher, batch), kl(student, teacher, batch))
    torch.testing.assert_close(loss(beta=1.0)(student, teacher, batch), kl(teacher, student, batch))


@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_near_the_ends_it_is_the_divergence_times_the_distance(beta):
    student, teacher = (random_outputs(seed=seed).map(torch.Tensor.double) for seed in (0, 1))
    batch = random_batch()
    value = loss(beta=beta)(student, teacher, batch) / min(beta, 1 - beta)
    torch.testing.assert_close(value, loss(beta=float(round(beta)))(student, teacher, batch), rtol=0.02, atol=0)


def test_certain_and_opposed_it_is_the_entropy_of_the_mixture():
    student, teacher = kdkit.Outputs(torch.tensor([[1e4, -1e4]])), kdkit.Outputs(torch.tensor([[-1e4, 1e4]]))
    assert loss()(student, teacher, random_batch(1)).item() == pytest.approx(math.log(2))
    assert loss(beta=0.25)(student, teacher, random_batch(1)).item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradient(beta):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(beta=beta)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.9, 1.0])
def test_keeps_the_promises_everywhere(beta):
    check_loss(JSD, beta=beta, temperature=2.0)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
