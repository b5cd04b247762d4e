import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

SRD = registry.load().losses["srd"]
PAIR = [{"student": "a", "teacher": "b"}]


def srd(student, teacher, size=4, layers=PAIR, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = SRD(SRD.Options(layers=layers, **options))
    s, t = random_outputs({"a": student, "c": student}, size=size), random_outputs({"b": teacher, "d": teacher}, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def pooled(f):
    return f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.sum((2, 3)) / f[0, 0].numel()


def normalised(v):
    """By the statistics of the batch; those of a batch of one are 0 and 1."""
    mean, variance = (v.mean(0), ((v - v.mean(0)) ** 2).mean(0)) if len(v) > 1 else (0, torch.ones_like(v[0]))
    return (v - mean) / (variance + 1e-5).sqrt()


def formula(loss, student, teacher, batch):
    weight = loss.projectors[0][0].weight[:, :, 0, 0]
    s, t = normalised(pooled(student.features["a"]) @ weight.T), normalised(pooled(teacher.features["b"]))
    total = 0
    for row_s, row_t in zip(s, t, strict=True):
        for x, y in zip(row_s, row_t, strict=True):
            total = total + (x - y).abs() ** loss.options.exponent
    return 2 * torch.log(total + 1e-5)


SHAPES = [((3,), (5,)), ((3, 4, 4), (5, 2, 2)), ((3, 4, 4), (3, 4, 4)), ((7, 3), (5,)), ((10, 3), (17, 4))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("exponent", [1.5, 4])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, exponent, shapes):
    loss, student, teacher, batch = srd(*shapes, size=size, exponent=exponent)
    if size == 2:  # which normalisation makes +-1 whatever they are, but for its eps: faint ones have a gradient that fp32 can hold
        student = student.map(lambda x: 0.01 * x)
    assert_agrees(loss, formula, student, teacher, batch)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("exponent", [2, 4])
def test_gradient(shapes, exponent):
    loss, student, teacher, batch = srd(*shapes, exponent=exponent)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize("exponent", [1, 1.5, 4, 8])
@pytest.mark.parametrize("gap", [0, 1e-30, 1e-6, 1e-2])
def test_equal_features_have_a_bounded_gradient(gap, exponent):
    loss, _, teacher, batch = srd((3,), (3,), exponent=exponent)
    with torch.no_grad():
        loss.projectors[0][0].weight.copy_(torch.eye(3)[:, :, None, None])
    f = (teacher.features["b"] + gap * torch.tensor([1.0, -2.0, 3.0])).requires_grad_()
    value = loss(kdkit.Outputs(teacher.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6
    if gap == 0:
        assert value.item() == pytest.approx(2 * math.log(1e-5))


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    loss, student, teacher, batch = srd((3, 4, 4), (5,), layers=layers)
    alone = []
    for i, pair in enumerate(layers):
        single = SRD(SRD.Options(layers=[pair]))
        single.projectors, single.norms = loss.projectors[i : i + 1], loss.norms[i : i + 1]
        alone.append(single(student, teacher, batch))
    torch.testing.assert_close(loss(student, teacher, batch), sum(alone) / 2)


def test_keeps_the_promises_with_another_exponent():
    check_loss(SRD, exponent=1)


def test_refuses_what_is_no_vector():
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be vectors"):
        srd((3,), ())
