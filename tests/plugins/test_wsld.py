import dataclasses

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

WSLD = registry.load().losses["wsld"]


def loss(**options):
    return WSLD(WSLD.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample at a time. The weight is a constant by definition, so it is taken from values without a gradient."""
    t, total = loss.options.temperature, 0
    for n, (z_s, z_t) in enumerate(zip(student.logits, teacher.logits, strict=True)):
        shares = torch.zeros_like(z_s)
        if batch.labels.ndim == 1:
            shares[batch.labels[n]] = 1
        else:
            shares = batch.labels[n]
        ce_s, ce_t = (-(shares * (z.exp() / z.exp().sum()).log()).sum() for z in (z_s.detach(), z_t.detach()))
        p, q = ((z / t).exp() / (z / t).exp().sum() for z in (z_s, z_t))
        total = total - (1 - (-ce_s / (ce_t + 1e-7)).exp()) * (q * p.log()).sum()
    return t**2 * total / len(student.logits)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 4.0}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 10)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_is_the_formula_with_mixed_labels():
    batch = random_batch()
    one_hot = torch.nn.functional.one_hot(batch.labels, 5)
    mixed = dataclasses.replace(batch, labels=0.7 * one_hot + 0.3 * one_hot.flip(0))
    shares = dataclasses.replace(mixed, labels=mixed.labels.double())
    student, teacher = random_outputs(), random_outputs(seed=1)
    assert_agrees(loss(), lambda ours, s, t, _: formula(ours, s, t, shares), student, teacher, mixed)
    torch.testing.assert_close(
        loss()(student, teacher, batch), loss()(student, teacher, dataclasses.replace(batch, labels=one_hot.float()))
    )


def test_a_student_that_is_sure_of_the_label_learns_nothing():
    sure = 1e4 * torch.nn.functional.one_hot(random_batch().labels, 5)
    z = sure.float().requires_grad_()
    value = loss()(kdkit.Outputs(z), random_outputs(seed=1), random_batch())
    value.backward()
    assert value.item() == 0 and not z.grad.any()


def test_a_teacher_that_is_sure_of_the_label_counts_in_full():
    sure = kdkit.Outputs(1e4 * torch.nn.functional.one_hot(random_batch().labels, 5).float())
    student = random_outputs()
    expected = 4 * torch.nn.functional.cross_entropy(student.logits / 2, random_batch().labels)
    torch.testing.assert_close(loss()(student, sure, random_batch()), expected)


def test_keeps_the_promises_without_softening():
    check_loss(WSLD, temperature=1.0)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
