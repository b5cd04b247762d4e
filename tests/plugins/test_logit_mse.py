import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LogitMSE = registry.load().losses["logit_mse"]


def formula(loss, student, teacher, batch):
    n, k = student.logits.shape
    return sum((student.logits[i, c] - teacher.logits[i, c]) ** 2 for i in range(n) for c in range(k)) / (n * k)


@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 4)])
def test_is_the_formula(size, classes):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(LogitMSE(LogitMSE.Options()), formula, student, teacher, random_batch(size, classes))


def test_gradient():
    z, teacher = random_outputs(size=3).logits.double().requires_grad_(), random_outputs(size=3, seed=1).map(torch.Tensor.double)
    assert torch.autograd.gradcheck(lambda z: LogitMSE(LogitMSE.Options())(kdkit.Outputs(z), teacher, random_batch(3)), z)


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\).*class set"):
        LogitMSE(LogitMSE.Options()).setup(random_outputs(), random_outputs(classes=7))
