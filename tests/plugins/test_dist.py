import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

DIST = registry.load().losses["dist"]


def loss(**options):
    return DIST(DIST.Options(**options))


def pearson(a, b):
    """Of two lists of numbers."""
    a, b = ([x - sum(xs) / len(xs) for x in xs] for xs in (list(a), list(b)))
    lengths = [sum(x**2 for x in xs) for xs in (a, b)]
    if float(lengths[0].detach()) == 0 or float(lengths[1].detach()) == 0:
        return 0.0  # and no slope, which the square root has none of here
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0].sqrt() * lengths[1].sqrt() + 1e-8)


def formula(loss, student, teacher, batch):
    o = loss.options
    p, q = ((x.logits / o.temperature).exp() for x in (student, teacher))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    rows = sum(pearson(p[n], q[n]) for n in range(len(p))) / len(p)
    columns = sum(pearson(p[:, c], q[:, c]) for c in range(p.shape[1])) / p.shape[1]
    return o.temperature**2 * (o.beta * (1 - rows) + o.gamma * (1 - columns))


@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"beta": 2.0, "gamma": 0.5}, {"gamma": 0.0}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 4)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_classes_leave_the_columns():
    """Rows of two probabilities correlate fully or inversely, whatever they are."""
    student, teacher = (random_outputs(size=8, classes=2, seed=seed) for seed in (0, 1))
    assert_agrees(loss(beta=0.0), formula, student, teacher, random_batch(8, 2))


def test_a_batch_of_one_leaves_the_rows():
    student, teacher = (random_outputs(size=1, seed=seed) for seed in (0, 1))
    z = student.logits.requires_grad_()
    value = loss(beta=0.0)(kdkit.Outputs(z), teacher, random_batch(1))
    value.backward()
    assert value.item() == 1 and not z.grad.any()


def test_is_zero_for_what_correlates_fully():
    teacher, batch = random_outputs(seed=1).map(torch.Tensor.double), random_batch()
    assert loss()(teacher, teacher, batch).item() == pytest.approx(0, abs=1e-6)
    assert loss()(random_outputs().map(torch.Tensor.double), teacher, batch).item() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_a_student_that_hardly_varies_has_a_bounded_gradient(scale):
    z = (scale * random_outputs().logits).requires_grad_()
    loss()(kdkit.Outputs(z), random_outputs(seed=1).map(lambda z: 20 * z), random_batch()).backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() < 1e5


def test_faint_probabilities_still_are_the_formula():
    student, teacher = (random_outputs(seed=seed).map(lambda z: 1e-3 * z) for seed in (0, 1))
    ours = loss().double()
    got, wanted = (f(*(x.map(torch.Tensor.double) for x in (student, teacher)), None) for f in (ours, lambda *a: formula(ours, *a)))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_gradient():
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss()(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


@pytest.mark.parametrize("options", [{"temperature": 4.0}, {"gamma": 0.0}, {"beta": 0.0}])
def test_keeps_the_promises_with_options(options):
    check_loss(DIST, **options)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
