import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

DKD = registry.load().losses["dkd"]
LogitKL = registry.load().losses["logit_kl"]


def loss(**options):
    return DKD(DKD.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample and one class at a time."""
    o, total = loss.options, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        if o.standardize:
            z_s, z_t = ((z - z.mean()) / (1e-7 + z.std(correction=1)) for z in (z_s, z_t))
        p, q = ((z / o.temperature).exp() / (z / o.temperature).exp().sum() for z in (z_s, z_t))
        others = [c for c in range(len(p)) if c != label]
        rest_p, rest_q = sum(p[c] for c in others), sum(q[c] for c in others)
        tckd = q[label] * (q[label] / p[label]).log() + rest_q * (rest_q / rest_p).log()
        nckd = sum(q[c] / rest_q * ((q[c] / rest_q) / (p[c] / rest_p)).log() for c in others)
        total = total + o.alpha * tckd + o.beta * nckd
    return o.temperature**2 * total / len(batch.classes)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "beta": 0.5}, {"alpha": 0.0}, {"beta": 0.0}, {"standardize": True}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 7), (4, 2)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    if classes == 2 and (options.get("standardize") or not options.get("alpha", 1.0)):
        pytest.skip("a constant: two classes rank no others, and standardized they are +-0.7")
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_recoupled_it_is_the_plain_divergence():
    """Eq. 5 of the paper: KL = TCKD + (1 - q_y) NCKD."""
    student, teacher, batch = random_outputs(size=1), random_outputs(size=1, seed=1), random_batch(1)
    rest = 1 - (teacher.logits / 4).softmax(1)[0, 0].item()
    torch.testing.assert_close(loss(beta=rest)(student, teacher, batch), LogitKL(LogitKL.Options())(student, teacher, batch))


@pytest.mark.parametrize("margin", [100.0, 1e4])
def test_large_margins_have_the_limit_of_the_formula(margin):
    """A student sure of the label, a teacher sure that it is another: q_y is 0 and 1 - p_y is 2 exp(-margin)."""
    z = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    value = loss(temperature=1.0)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[-margin, 0.0, 0.0]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(margin - math.log(2))
    torch.testing.assert_close(z.grad, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("options", [{}, {"standardize": True}])
def test_gradient(options):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(**options)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_keeps_the_promises_standardized():
    check_loss(DKD, standardize=True, temperature=1.0)


@pytest.mark.parametrize("classes", [(5, 7), (1, 1)])
def test_refuses_other_classes(classes):
    with pytest.raises(kdkit.ShapeError, match=rf"logits \(6, {classes[0]}\)"):
        loss().setup(*(random_outputs(classes=k) for k in classes))
