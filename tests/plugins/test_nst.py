import pytest
import torch
from naive_maps import pooled_alike

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

NST = registry.load().losses["nst"]
PAIR = [{"student": "a", "teacher": "b"}]
LOSS = NST(NST.Options(layers=PAIR))


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def kernel(one, other):
    """Mean over the pairs of channels of two images."""
    values = [(x * y).sum() ** 2 for x in one for y in other]
    return sum(values) / len(values)


def formula(loss, student, teacher, batch):
    total, (f_s, f_t) = 0, pooled_alike(student.features["a"], teacher.features["b"])
    for s, t in zip(f_s, f_t, strict=True):
        x, y = ([channel / (channel**2).sum() ** 0.5 for channel in image] for image in (s, t))
        total = total + kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    return total / len(f_s)


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 4, 4), (2, 7, 6)), ((3, 4, 6), (2, 8, 3))]
SHAPES += [((6, 2, 2), (6, 2, 2)), ((6, 4, 4), (9, 2, 3))]  # fewer positions than channels


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes):
    assert_agrees(LOSS, formula, *answers(*shapes, size))


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    assert_agrees(LOSS, formula, *answers(*shapes, 64))


def test_is_the_distance_between_mean_outer_products():
    """With the kernel (x.y)^2, the discrepancy is that of the means of x x^T."""
    student, teacher, batch = answers((3, 4, 4), (5, 4, 4), 4)
    x, y = (torch.nn.functional.normalize(f.double().flatten(2), dim=2) for f in (student.features["a"], teacher.features["b"]))
    mean_x, mean_y = (torch.einsum("bci,bcj->bij", z, z) / z.shape[1] for z in (x, y))
    expected = ((mean_x - mean_y) ** 2).sum((1, 2)).mean()
    torch.testing.assert_close(LOSS(student, teacher, batch).double(), expected, rtol=1e-4, atol=1e-7)


def test_neither_the_order_of_channels_nor_their_scale_matters():
    student, teacher, batch = answers((3, 4, 4), (3, 4, 4), 4)
    alike = kdkit.Outputs(teacher.logits, {"b": -7 * student.features["a"].flip(1)})
    assert LOSS(student, alike, batch).item() == pytest.approx(0, abs=1e-6)
    assert LOSS(student, teacher, batch).item() > 1e-2


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (3, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (NST(NST.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 2)
    f, teacher = student.features["a"].double().requires_grad_(), teacher.map(torch.Tensor.double)
    assert torch.autograd.gradcheck(lambda f: LOSS(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-7, 1e-5])
def test_faint_channels_have_bounded_gradients(scale):
    student, teacher, batch = answers((3, 4, 4), (5, 4, 4), 4)
    for factor in (torch.tensor([scale, scale, scale]), torch.tensor([scale, 1.0, 1.0])):
        f = (factor[:, None, None] * student.features["a"]).requires_grad_()
        LOSS(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
        assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        LOSS.setup(*answers(student, teacher, 4)[:2])
