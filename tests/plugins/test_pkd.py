import numpy as np
import pytest
import torch
from naive_maps import aligned, resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

PKD = registry.load().losses["pkd"]
PAIR = [{"student": "a", "teacher": "b"}]


def pkd(student, teacher, size=4):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = PKD(PKD.Options(layers=PAIR))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    """One channel at a time."""
    f_t, total = teacher.features["b"], 0
    f_s = resized(aligned(student.features["a"], loss.adapters[0]), f_t.shape[2:])
    for channel in range(f_t.shape[1]):
        s, t = (f[:, channel].flatten() for f in (f_s, f_t))
        s, t = ((x - x.sum() / len(x)) / ((((x - x.sum() / len(x)) ** 2).sum() / (len(x) - 1)) ** 0.5 + 1e-6) for x in (s, t))
        total = total + ((s - t) ** 2).sum()
    return total / 2 / f_t.numel()


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (3, 8, 6))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, shapes):
    loss, *answers = pkd(*shapes, size=size)
    assert_agrees(loss, formula, *answers)


def test_is_one_minus_pearsons_correlation():
    """But for n - 1 in place of n, and the 1e-6."""
    loss, student, teacher, batch = pkd((3, 4, 4), (3, 4, 4))
    f_s, f_t = (f.transpose(0, 1).flatten(1).double().numpy() for f in (student.features["a"], teacher.features["b"]))
    correlations = [np.corrcoef(s, t)[0, 1] for s, t in zip(f_s, f_t, strict=True)]
    assert loss(student, teacher, batch).item() == pytest.approx((1 - np.mean(correlations)) * 63 / 64, rel=1e-4)


def test_neither_scale_nor_shift_matters():
    loss, student, teacher, batch = pkd((3, 4, 4), (3, 4, 4))
    other = student.map(lambda f: 7 * f + 2)
    torch.testing.assert_close(loss(other, teacher, batch), loss(student, teacher, batch), rtol=1e-4, atol=1e-6)
    assert loss(student, kdkit.Outputs(student.logits, {"b": other.features["a"]}), batch).item() == pytest.approx(0, abs=1e-6)


def test_an_adapter_only_where_channels_differ():
    assert not list(pkd((3, 4, 4), (3, 8, 8))[0].parameters())
    assert [tuple(p.shape) for p in pkd((3, 4, 4), (5, 4, 4))[0].parameters()] == [(5, 3, 1, 1)]


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (3, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    values = []
    for chosen in (layers, layers[:1], layers[1:]):
        loss = PKD(PKD.Options(layers=chosen))
        loss.setup(student, teacher)
        values.append(loss(student, teacher, random_batch()))
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = pkd(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_a_constant_channel_counts_as_zeros_without_gradient():
    loss, student, teacher, batch = pkd((2, 4, 4), (2, 4, 4))
    f = student.features["a"].clone()
    f[:, 0] = 0.25
    f.requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    t = teacher.features["b"][:, 0]
    rest = (
        (
            (f - f[:, 1].mean()) / f[:, 1].std()
            - (teacher.features["b"] - teacher.features["b"][:, 1].mean()) / teacher.features["b"][:, 1].std()
        )[:, 1]
        ** 2
    ).sum()
    torch.testing.assert_close(value, ((((t - t.mean()) / t.std()) ** 2).sum() + rest) / 2 / f.numel(), rtol=1e-4, atol=1e-6)
    assert not f.grad[:, 0].any() and f.grad[:, 1].any()


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-6, 1e-4])
def test_faint_channels_have_bounded_gradients(scale):
    loss, student, teacher, batch = pkd((3, 4, 4), (3, 4, 4))
    f = (scale * student.features["a"]).requires_grad_()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_one_position_of_one_image_gives_zero():
    loss, student, teacher, batch = pkd((3, 1, 1), (3, 1, 1), size=1)
    f = student.features["a"].requires_grad_()
    value = loss(student, teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        pkd(student, teacher)
