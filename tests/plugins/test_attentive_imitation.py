import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

Attentive = registry.load().losses["attentive_imitation"]


def loss(**options):
    return Attentive(Attentive.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample at a time."""
    errors = [sum((z - y) ** 2 for z, y in zip(t, target, strict=True)) for t, target in zip(teacher.logits, batch.labels, strict=True)]
    eta = loss.options.eta or max(errors)
    total = 0 * student.logits.sum()
    for s, t, error in zip(student.logits, teacher.logits, errors, strict=True):
        total = total + max(1 - error / eta, 0 * error) * sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
    return total / len(errors)


@pytest.mark.parametrize("eta", [None, 0.5, 100])
@pytest.mark.parametrize("size", [1, 12])
def test_is_the_formula(size, eta):
    student, teacher = (random_outputs(size=size, classes=2, seed=seed) for seed in (0, 1))
    assert_agrees(loss(eta=eta), formula, student, teacher, random_batch(size, 2, rows="numbers"))


def test_a_teacher_without_an_error_is_imitated_whole():
    student, teacher = (random_outputs(classes=2, seed=seed) for seed in (0, 1))
    batch = kdkit.Batch(teacher.logits, teacher.logits, torch.arange(6))
    distance = (student.logits - teacher.logits).square().sum(1).mean()
    torch.testing.assert_close(loss()(student, teacher, batch), distance)


def test_keeps_the_promises_with_an_eta():
    check_loss(Attentive, eta=50.0)
