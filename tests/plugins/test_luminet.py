import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LumiNet = registry.load().losses["luminet"]


def loss(**options):
    return LumiNet(LumiNet.Options(**options))


def formula(loss, student, teacher, batch):
    """Class by class, then sample by sample."""
    n, k = student.logits.shape
    h_s, h_t = (torch.zeros(n, k, dtype=torch.float64) for _ in range(2))
    for h, z in ((h_s, student.logits), (h_t, teacher.logits)):
        for c in range(k):
            mean = sum(z[i, c] for i in range(n)) / n
            variance = sum((z[i, c] - mean) ** 2 for i in range(n)) / n
            for i in range(n):
                h[i, c] = (z[i, c] - mean) / (variance + 1e-5) ** 0.5 / loss.options.temperature
    p, q = (h.exp() / h.exp().sum(1, keepdim=True) for h in (h_s, h_t))
    return (q * (q.log() - p.log())).sum() / n


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize(("size", "classes"), [(4, 5), (3, 2), (16, 4)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_a_batch_of_one_is_exactly_zero():
    z = random_outputs(size=1).logits.requires_grad_()
    value = loss()(kdkit.Outputs(z), random_outputs(size=1, seed=1), random_batch(1))
    value.backward()
    assert value.item() == 0 and not z.grad.any()


def test_a_classs_scale_and_shift_do_not_count():
    """But for the 1e-5 beside the variance."""
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    moved = student.map(lambda z: z * torch.tensor([3.0, 1, 2, 5, 1]) + torch.tensor([0.0, 7, -2, 1, 4]))
    torch.testing.assert_close(loss()(moved, teacher, batch), loss()(student, teacher, batch), rtol=1e-3, atol=1e-5)


def test_a_class_that_is_constant_over_the_batch_is_harmless():
    z = random_outputs().logits.index_fill(1, torch.tensor([2]), 4.0).requires_grad_()
    value = loss()(kdkit.Outputs(z), random_outputs(seed=1), random_batch())
    value.backward()
    assert value.isfinite() and z.grad.abs().max() < 316


def test_opposed_logits_of_ten_thousand():
    """Two samples stand one deviation above and below the mean: h = +-1."""
    z = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    value = loss(temperature=1.0)(kdkit.Outputs(z), kdkit.Outputs(-z.detach()), random_batch(2))
    value.backward()
    p = torch.tensor([1.0, -1.0]).softmax(0)
    assert value.item() == pytest.approx((p[0] * 2 - p[1] * 2).item()) and z.grad.isfinite().all()


def test_only_samples_can_be_gathered():
    assert LumiNet.for_tasks(LumiNet.Options()) == {"classes"}
    assert LumiNet.for_tasks(LumiNet.Options(gather=True)) == {"classes of samples"}


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"gather": True}])
def test_keeps_the_promises_with_options(options):
    check_but(LumiNet, **options)
