import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

LOSSES = registry.load().losses
Skewed = LOSSES["skewed_kl"]


def loss(**options):
    return Skewed(Skewed.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample at a time."""
    a, t, total = loss.options.alpha, loss.options.temperature, 0
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        p, q = ((z / t).exp() / (z / t).exp().sum() for z in (z_s, z_t))
        u, v = (q, p) if loss.options.direction == "forward" else (p, q)
        total = total + (u * (u / (a * u + (1 - a) * v)).log()).sum()
    return total / len(student.logits)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"alpha": 0.5, "temperature": 3.0}, {"alpha": 0.9}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (64, 10)])
def test_is_the_formula(size, classes, options, direction):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(direction=direction, **options), formula, student, teacher, random_batch(size, classes))


def test_without_a_share_it_is_the_divergence_of_either_direction():
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    kl = LOSSES["logit_kl"](LOSSES["logit_kl"].Options(temperature=1.0))
    torch.testing.assert_close(loss(alpha=0)(student, teacher, batch), kl(student, teacher, batch))
    torch.testing.assert_close(loss(alpha=0, direction="reverse")(student, teacher, batch), kl(teacher, student, batch))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_certain_and_opposed_it_is_the_logarithm_of_the_share(direction):
    student, teacher = kdkit.Outputs(torch.tensor([[1e4, -1e4]])), kdkit.Outputs(torch.tensor([[-1e4, 1e4]]))
    assert loss(direction=direction)(student, teacher, random_batch(1)).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_keeps_the_promises_everywhere(direction, alpha):
    check_loss(Skewed, direction=direction, alpha=alpha, temperature=2.0)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
