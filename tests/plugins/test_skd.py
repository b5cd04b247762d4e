import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

SKD = registry.load().losses["skd"]
OPTIONS = [{}, {"instance": 0.0}, {"direction": 0.0, "temperature": 1.0}, {"regularization": 1.0}]


def loss(**options):
    return SKD(SKD.Options(**options))


def formula(loss, student, teacher, batch):
    """One row at a time, by the inverse of the covariance."""
    o, n, total = loss.options, len(student.logits), 0
    d = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for z, sign in ((student.logits, 1), (teacher.logits, -1)):
                d[i, j] = d[i, j] + sign * (z[i] @ z[j]) / (z[i] @ z[i]).sqrt() / (z[j] @ z[j]).sqrt()
    inverse = (torch.cov(d.T) + o.regularization * torch.eye(n)).inverse()
    for i, (z_s, z_t) in enumerate(zip(student.logits, teacher.logits, strict=True)):
        p, q = ((z / o.temperature).exp() / (z / o.temperature).exp().sum() for z in (z_s, z_t))
        total = total + o.instance * (q * (q.log() - p.log())).sum() + o.direction * (d[i] @ inverse @ d[i]).sqrt()
    return total / n


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "classes"), [(2, 5), (5, 3), (12, 7)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_samples_by_hand():
    """Cosines 0 and 1: D = [[0, -1], [-1, 0]], covariance 1/2 [[1, -1], [-1, 1]] + 1/2 I, inverse 2/3 [[2, 1], [1, 2]]."""
    student, teacher = kdkit.Outputs(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), kdkit.Outputs(torch.ones(2, 2))
    value = loss(instance=0.0, regularization=0.5)(student, teacher, random_batch(2))
    assert value.item() == pytest.approx(math.sqrt(4 / 3))


def test_dividing_the_cosines_is_a_larger_regularization():
    """As the module says of the released code."""
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    d = sum(
        sign * torch.nn.functional.normalize(x.logits) @ torch.nn.functional.normalize(x.logits).T
        for x, sign in ((student, 1), (teacher, -1))
    )
    d = d / 5
    inverse = (torch.cov(d.T) + 0.1 * torch.eye(6)).inverse()
    wanted = torch.stack([(row @ inverse @ row).sqrt() for row in d]).mean()
    torch.testing.assert_close(loss(instance=0.0, regularization=0.1 * 5**2)(student, teacher, batch), wanted)


def test_a_batch_of_one_has_no_directions():
    z = random_outputs(size=1).logits.requires_grad_()
    value = loss(instance=0.0)(kdkit.Outputs(z), random_outputs(size=1, seed=1), random_batch(1))
    value.backward()
    assert value.item() == 0 and not z.grad.any()


def test_equal_answers_have_no_slope():
    z = random_outputs().logits.requires_grad_()
    value = loss()(kdkit.Outputs(z), random_outputs(), random_batch())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and z.grad.abs().max() < 1e-5


def test_the_lengths_of_the_logits_do_not_count_for_the_directions():
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    longer = student.map(lambda z: z * torch.arange(1.0, 7)[:, None])
    torch.testing.assert_close(loss(instance=0.0)(longer, teacher, batch), loss(instance=0.0)(student, teacher, batch))


@pytest.mark.parametrize("regularization", [0.1, 0.01])
@pytest.mark.parametrize("classes", [2, 10])
def test_large_batches_of_opposed_answers_are_finite_in_fp32(classes, regularization):
    """The differences of cosines are up to 2, and have a rank of at most 2 K: most variances are the regularization alone."""
    z = (100 * random_outputs(size=512, classes=classes).logits).requires_grad_()
    teacher = random_outputs(size=512, classes=classes, seed=1)
    values = []
    for dtype in (torch.float32, torch.float64):
        answers = kdkit.Outputs(z.to(dtype)), teacher.map(lambda x, dtype=dtype: x.to(dtype))
        values.append(loss(instance=0.0, regularization=regularization)(*answers, random_batch(512)))
    values[0].backward()
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-3) and z.grad.isfinite().all()


@pytest.mark.parametrize("options", [*OPTIONS[1:], {"gather": True, "regularization": 0.01}])
def test_keeps_the_promises_with_options(options):
    check_but(SKD, **options)
