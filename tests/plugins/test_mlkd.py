import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

MLKD = registry.load().losses["mlkd"]
LogitKL = registry.load().losses["logit_kl"]


def loss(**options):
    return MLKD(MLKD.Options(**options))


def formula(loss, student, teacher, batch):
    """Every correlation as a sum of its own."""
    o, total = loss.options, 0
    z_s, z_t = student.logits, teacher.logits
    n, k = z_s.shape
    if o.standardize:
        z_s, z_t = (torch.stack([(row - row.mean()) / (1e-7 + row.std(correction=1)) for row in z]) for z in (z_s, z_t))
    for t in o.temperatures:
        p, q = (torch.stack([(row / t).exp() / (row / t).exp().sum() for row in z]) for z in (z_s, z_t))
        total = total + o.instance * t**2 * sum((q[i] * (q[i] / p[i]).log()).sum() for i in range(n)) / n
        classes = [((q[:, a] * q[:, b]).sum() - (p[:, a] * p[:, b]).sum()) ** 2 for a in range(k) for b in range(k)]
        samples = [((q[i] * q[j]).sum() - (p[i] * p[j]).sum()) ** 2 for i in range(n) for j in range(n)]
        total = total + o.category * sum(classes) / k + o.batch * sum(samples) / n
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"standardize": True},
        {"temperatures": [1.0]},
        {"instance": 0.0, "batch": 0.0},
        {"instance": 0.0, "category": 0.0},
        {"instance": 9.0, "category": 0.5, "batch": 2.0},
    ],
)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (7, 4)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_is_the_formula_on_a_usual_batch():
    student, teacher = (random_outputs(size=64, classes=3, seed=seed) for seed in (0, 1))
    assert_agrees(loss(temperatures=[3.0]), formula, student, teacher, random_batch(64, 3))


def test_without_correlations_it_is_the_plain_divergence():
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    expected = sum(LogitKL(LogitKL.Options(temperature=t))(student, teacher, batch) for t in (2.0, 5.0))
    torch.testing.assert_close(loss(temperatures=[2, 5], category=0, batch=0)(student, teacher, batch), expected)


def test_correlations_do_not_see_the_order_of_classes_or_samples():
    student, teacher = random_outputs(), random_outputs(seed=1)
    batches, classes = loss(instance=0, category=0), loss(instance=0, batch=0)
    shuffled = student.map(lambda z: z[:, [2, 0, 1, 4, 3]])
    torch.testing.assert_close(batches(shuffled, teacher, random_batch()), batches(student, teacher, random_batch()))
    reversed_ = student.map(lambda z: z.flip(0))
    torch.testing.assert_close(classes(reversed_, teacher, random_batch()), classes(student, teacher, random_batch()))


@pytest.mark.parametrize("standardize", [False, True])
def test_gradient(standardize):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    ours = loss(standardize=standardize)
    assert torch.autograd.gradcheck(lambda z: ours(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


@pytest.mark.parametrize("options", [{"standardize": True}, {"instance": 0.0}])
def test_keeps_the_promises_with_options(options):
    check_loss(MLKD, **options)


@pytest.mark.parametrize("temperatures", [[], [2.0, 0.0]])
def test_needs_temperatures_above_zero(temperatures):
    with pytest.raises(ValueError, match="temperatures"):
        loss(temperatures=temperatures)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
