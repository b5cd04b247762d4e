import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LOSSES = registry.load().losses
SoftLabels = LOSSES["soft_labels"]


def loss(**options):
    return SoftLabels(SoftLabels.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample and one class at a time."""
    total = 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.labels, strict=True):
        for k in range(len(z_s)):
            y = label[k] if label.ndim else float(k == label)
            target = (1 - loss.options.alpha) * y + loss.options.alpha * z_t[k].exp() / z_t.exp().sum()
            total = total - target * (z_s[k].exp() / z_s.exp().sum()).log()
    return total / len(batch.labels)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (16, 10)])
def test_is_the_formula(size, classes, alpha):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(alpha=alpha), formula, student, teacher, random_batch(size, classes))


def test_takes_shares_of_classes():
    batch = random_batch()
    shares = 0.7 * torch.nn.functional.one_hot(batch.labels, 5) + 0.06
    assert_agrees(loss(), formula, random_outputs(), random_outputs(seed=1), kdkit.Batch(batch.inputs, shares, batch.index))


def test_is_a_mixture_of_cross_entropy_and_divergence_but_for_a_constant():
    """The gradients agree, the values by the teacher's entropy."""
    student, teacher, batch, alpha = random_outputs(), random_outputs(seed=1), random_batch(), 0.6
    parts = [LOSSES["cross_entropy"](LOSSES["cross_entropy"].Options()), LOSSES["logit_kl"](LOSSES["logit_kl"].Options(temperature=1))]
    z = student.logits.requires_grad_()
    ce, kl = (part(kdkit.Outputs(z), teacher, batch) for part in parts)
    mixture, value = (1 - alpha) * ce + alpha * kl, loss(alpha=alpha)(kdkit.Outputs(z), teacher, batch)
    entropy = torch.distributions.Categorical(logits=teacher.logits).entropy().mean()
    torch.testing.assert_close(value, mixture + alpha * entropy)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(mixture, z))


def test_a_student_that_is_its_own_teacher_follows_the_labels():
    z, batch = random_outputs().logits.requires_grad_(), random_batch()
    own = loss(alpha=0.8)(kdkit.Outputs(z), kdkit.Outputs(z.detach()), batch)
    labels = torch.nn.functional.cross_entropy(z, batch.labels)
    torch.testing.assert_close(torch.autograd.grad(own, z)[0], 0.2 * torch.autograd.grad(labels, z)[0])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_keeps_the_promises_with_options(alpha):
    check_but(SoftLabels, *(["check_reads_every_layer"] if alpha == 0 else []), alpha=alpha)  # labels alone


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        loss().setup(random_outputs(), random_outputs(classes=7))
