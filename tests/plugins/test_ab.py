import pytest
import torch
from naive_maps import convolved, normalised, resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

AB = registry.load().losses["ab"]
PAIR = [{"student": "a", "teacher": "b"}]


def ab(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = AB(AB.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    """The four cases of a value, as the paper writes them."""
    m, t, (conv, norm) = loss.options.margin, teacher.features["b"], loss.connectors[0]
    s = resized(normalised(convolved(student.features["a"], conv), norm), t.shape[2:])
    off = (s + m) ** 2 * ((s > -m) & (t <= 0))
    on = (s - m) ** 2 * ((s <= m) & (t > 0))
    return (off + on).sum() / len(s)


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (2, 7, 6))]


@pytest.mark.parametrize("margin", [1.0, 0.3])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes, margin):
    loss, *answers = ab(*shapes, size=size, margin=margin)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = ab(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


def test_only_the_sign_of_the_teacher_counts():
    loss, student, teacher, batch = ab((3, 4, 4), (5, 4, 4))
    other = teacher.map(lambda t: 100 * t.sign())
    assert torch.equal(loss(student, teacher, batch), loss(student, other, batch))
    silent, off = teacher.map(torch.zeros_like), teacher.map(lambda t: -1 - t.abs())
    assert torch.equal(loss(student, silent, batch), loss(student, off, batch))


def test_nothing_beyond_the_margin():
    loss, student, teacher, batch = ab((3, 4, 4), (3, 4, 4))
    loss.connectors[0] = torch.nn.Identity()
    agrees = kdkit.Outputs(student.logits, {"a": teacher.features["b"].sign() * 1.01})
    assert loss(agrees, teacher, batch).item() == 0


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    both, alone = AB(AB.Options(layers=layers)), []
    both.setup(student, teacher)
    for i, layer in enumerate(layers):
        one = AB(AB.Options(layers=[layer]))
        one.setup(student, teacher)
        one.connectors[0].load_state_dict(both.connectors[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = ab(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_keeps_the_promises_with_another_margin():
    check_loss(AB, margin=0.1)


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        ab(student, teacher)
