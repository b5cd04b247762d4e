import pytest
import torch
from naive_maps import aligned

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

ICKD = registry.load().losses["ickd"]
PAIR = [{"student": "a", "teacher": "b"}]


def ickd(student, teacher, size=4):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = ICKD(ICKD.Options(layers=PAIR))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def correlations(image):
    """Inner products of one image's channels, rows of unit length."""
    rows = torch.stack([torch.stack([(one * other).sum() for other in image]) for one in image])
    return torch.stack([row / (row**2).sum() ** 0.5 for row in rows])


def formula(loss, student, teacher, batch):
    f_s, f_t = aligned(student.features["a"], loss.adapters[0]), teacher.features["b"]
    total = sum(((correlations(s) - correlations(t)) ** 2).sum() for s, t in zip(f_s, f_t, strict=True))
    return total / (f_t.shape[0] * f_t.shape[1])


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (3, 8, 6)), ((3, 1, 1), (5, 1, 1))]
SHAPES += [((9, 2, 2), (9, 2, 2)), ((6, 2, 2), (9, 2, 3))]  # fewer positions than channels


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes):
    loss, *answers = ickd(*shapes, size=size)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = ickd(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


def test_tokens_are_a_map():
    loss, student, teacher, batch = ickd((17, 3), (3, 4, 4))
    maps = student.features["a"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(loss(kdkit.Outputs(student.logits, {"a": maps}), teacher, batch), loss(student, teacher, batch))


def test_neither_scale_nor_the_order_of_positions_matters():
    loss, student, teacher, batch = ickd((3, 4, 4), (3, 4, 4))
    other = kdkit.Outputs(student.logits, {"b": 7 * student.features["a"].flip(2)})
    assert loss(student, other, batch).item() == pytest.approx(0, abs=1e-10)
    assert loss(student, teacher, batch).item() > 1e-2


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (3, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    values = []
    for chosen in (layers, layers[:1], layers[1:]):
        loss = ICKD(ICKD.Options(layers=chosen))
        loss.setup(student, teacher)
        values.append(loss(student, teacher, random_batch()))
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = ickd(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 1, 2)])
def test_a_silent_channel_has_a_row_of_zeros_without_gradient(shape):
    loss, student, teacher, batch = ickd(shape, shape)
    f = student.features["a"].clone()
    f[:, 0] = 0
    f.requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    total = 0
    for s, t in zip(f.detach(), teacher.features["b"], strict=True):
        rows = torch.zeros(3, 3)
        rows[1:, 1:] = correlations(s[1:])
        total = total + ((rows - correlations(t)) ** 2).sum()
    torch.testing.assert_close(value, total / 12)
    assert f.grad.isfinite().all() and 0 < f.grad[:, 0].abs().max() < 1  # by its column: what the others' products with it should be


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 1, 2)])
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-5])
def test_faint_channels_have_bounded_gradients(scale, shape):
    loss, student, teacher, batch = ickd(shape, shape)
    for factor in (torch.tensor([scale, scale, scale]), torch.tensor([scale, 1.0, 1.0])):
        f = (factor[:, None, None] * student.features["a"]).requires_grad_()
        loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
        assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        ickd(student, teacher)
