import math

import pytest
import torch

import kdkit
from kdkit.contracts.options import at_epoch
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

CTKD = registry.load().losses["ctkd"]
LogitKL = registry.load().losses["logit_kl"]


def ctkd(size=6, classes=5, **options):
    """The loss, set up, and what it compares."""
    loss = CTKD(CTKD.Options(**{"reversal": 1.0, **options}))
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    loss.setup(student, teacher)
    return loss, student, teacher, random_batch(size, classes)


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample at a time; the value of theta, with -reversal times its slope."""
    o, total = loss.options, 0
    theta = loss.theta.detach() * (1 + o.reversal) - o.reversal * loss.theta
    t = o.start + o.range / (1 + (-theta).exp())
    for z_s, z_t in zip(student.logits, teacher.logits, strict=True):
        p, q = ((z / t).exp() / (z / t).exp().sum() for z in (z_s, z_t))
        total = total + (q * (q / p).log()).sum()
    return t**2 * total / len(student.logits)


@pytest.mark.parametrize("options", [{}, {"reversal": 0.3}, {"reversal": 0.0}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 10)])
def test_is_the_formula(size, classes, options):
    loss, *answers = ctkd(size, classes, start=0.5, range=1.0, **options)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_formula_at_high_temperatures(dtype, size, classes):
    """There T^2 KL hardly depends on T: theta's slope is a small difference of large terms, exact in fp64 only."""
    loss, student, teacher, batch = ctkd(size, classes)
    found = []
    for compute, precision in ((loss.to(dtype), dtype), (lambda *answers: formula(loss.double(), *answers), torch.float64)):
        z = student.logits.to(precision).requires_grad_()
        value = compute(kdkit.Outputs(z), teacher.map(lambda x: x.to(precision)), batch)  # noqa: B023
        found.append([x.double() for x in (value, *torch.autograd.grad(value, [z, loss.theta]))])
    (value, slope, turn), exact = found
    limit = 1e-6 if dtype == torch.float64 else 1e-4
    assert (value - exact[0]).abs() <= limit * exact[0]
    assert (slope - exact[1]).abs().max() <= limit * exact[1].abs().max()
    assert (turn - exact[2]).abs() <= limit * (exact[2].abs() if dtype == torch.float64 else exact[0])


def test_is_the_divergence_at_its_temperature():
    loss, student, teacher, batch = ctkd()
    t = 1 + 20 / (1 + math.exp(-1))
    expected = LogitKL(LogitKL.Options(temperature=t))(student, teacher, batch)
    torch.testing.assert_close(loss(student, teacher, batch), expected)


def test_descending_moves_the_temperature_to_a_larger_divergence():
    loss, student, teacher, batch = ctkd()
    before = loss(student, teacher, batch)
    before.backward()
    with torch.no_grad():
        loss.theta -= 0.5 * loss.theta.grad.sign()
    assert loss(student, teacher, batch) > before


def test_the_reversal_rises_over_ten_epochs():
    options = CTKD.Options()
    factors = [at_epoch(options, epoch).reversal for epoch in (0, 2.5, 5, 10, 200)]
    assert factors == pytest.approx([0, 0.5 - 0.5 * math.cos(math.pi / 4), 0.5, 1, 1])


def test_at_first_the_temperature_rests():
    loss, *answers = ctkd(reversal=0.0)
    loss(*answers).backward()
    assert loss.theta.grad.item() == 0


def test_by_hand_it_takes_a_number():
    with pytest.raises(kdkit.PluginError, match="reversal: a ramp needs the engine.*give a number"):
        kdkit.build_loss("ctkd")
    assert kdkit.build_loss("ctkd", reversal=1.0).options.reversal == 1


def test_gradient():
    """Of the student; theta's is no derivative by definition, and compared with the formula's above."""
    loss, student, teacher, batch = ctkd(size=4)
    z = student.logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss.double()(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_keeps_the_promises_near_one():
    check_loss(CTKD, reversal=0.5, start=0.5, range=1.0)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        CTKD(CTKD.Options()).setup(random_outputs(), random_outputs(classes=7))
