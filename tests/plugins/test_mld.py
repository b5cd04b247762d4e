import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LOSSES = registry.load().losses
MLD = LOSSES["mld"]


def formula(loss, student, teacher, batch):
    """One label at a time."""
    total = 0
    for s, t in zip(student.logits, teacher.logits, strict=True):
        for k in range(len(s)):
            p, q = 1 / (1 + (-s[k]).exp()), 1 / (1 + (-t[k]).exp())
            total = total + q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return total / len(student.logits)


@pytest.mark.parametrize(("size", "labels"), [(1, 5), (2, 1), (20, 3)])
def test_is_the_formula(size, labels):
    student, teacher = (random_outputs(size=size, classes=labels, seed=seed) for seed in (0, 1))
    assert_agrees(MLD(MLD.Options()), formula, student, teacher, random_batch(size, labels, rows="labels"))


def test_opposed_logits_of_ten_thousand():
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = MLD(MLD.Options())(kdkit.Outputs(z), kdkit.Outputs(-z.detach()), random_batch(1))
    value.backward()
    assert value.item() == 2e4 and z.grad.tolist() == [[-1, 1]]


def test_its_gradient_is_that_of_binary_kd_times_the_labels():
    binary = LOSSES["binary_kd"]
    z, teacher = random_outputs(classes=4).logits.requires_grad_(), random_outputs(classes=4, seed=1)
    slopes = []
    for loss in (MLD(MLD.Options()), binary(binary.Options(target="sigmoid"))):
        slopes += torch.autograd.grad(loss(kdkit.Outputs(z), teacher, random_batch()), [z])
    torch.testing.assert_close(slopes[0], 4 * slopes[1])
