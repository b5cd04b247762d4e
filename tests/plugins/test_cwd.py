import pytest
import torch
from naive_maps import aligned, resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

CWD = registry.load().losses["cwd"]
PAIR = [{"student": "a", "teacher": "b"}]


def cwd(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = CWD(CWD.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    """Probabilities written out, one channel of one image at a time."""
    f_t, t, total = teacher.features["b"], loss.options.temperature, 0
    f_s = resized(aligned(student.features["a"], loss.adapters[0]), f_t.shape[2:])
    for image_s, image_t in zip(f_s, f_t, strict=True):
        for channel_s, channel_t in zip(image_s, image_t, strict=True):
            p, q = ((channel / t).exp() / (channel / t).exp().sum() for channel in (channel_s, channel_t))
            total = total + (q * (q / p).log()).sum()
    return t**2 * total / (f_t.shape[0] * f_t.shape[1])


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (3, 8, 6)), ((2, 1, 1), (3, 2, 2))]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shapes", SHAPES[:4])
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes, temperature):
    loss, *answers = cwd(*shapes, size=size, temperature=temperature)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = cwd(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


def test_an_adapter_only_where_channels_differ():
    assert not list(cwd((3, 4, 4), (3, 8, 8))[0].parameters())
    assert [tuple(p.shape) for p in cwd((3, 4, 4), (5, 4, 4))[0].parameters()] == [(5, 3, 1, 1)]


def test_a_constant_added_to_a_channel_does_not_matter():
    loss, student, teacher, batch = cwd((3, 4, 4), (3, 4, 4))
    shifted = kdkit.Outputs(student.logits, {"a": student.features["a"] + torch.tensor([5.0, -2.0, 100.0])[:, None, None]})
    torch.testing.assert_close(loss(shifted, teacher, batch), loss(student, teacher, batch), rtol=1e-4, atol=1e-6)
    assert loss(student, kdkit.Outputs(student.logits, {"b": shifted.features["a"]}), batch).item() == pytest.approx(0, abs=1e-5)


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (3, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    values = []
    for chosen in (layers, layers[:1], layers[1:]):
        loss = CWD(CWD.Options(layers=chosen))
        loss.setup(student, teacher)
        values.append(loss(student, teacher, random_batch()))
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)


@pytest.mark.parametrize("shapes", SHAPES[1:])
def test_gradient(shapes):
    loss, student, teacher, batch = cwd(*shapes, size=2, temperature=1.0)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize("height", [100.0, 1e4])
def test_sharp_peaks_have_the_limit_of_the_formula(height):
    """The teacher looks at the first position, the student at the last: -log p is the height."""
    f = torch.zeros(1, 1, 2, 2)
    student, teacher = f.index_fill(3, torch.tensor([1]), height).requires_grad_(), f.index_fill(3, torch.tensor([0]), height)
    value = cwd((1, 2, 2), (1, 2, 2), temperature=1.0)[0](
        kdkit.Outputs(f, {"a": student}), kdkit.Outputs(f, {"b": teacher}), random_batch(1)
    )
    value.backward()
    assert value.item() == pytest.approx(height)
    torch.testing.assert_close(student.grad, torch.tensor([[[[-0.5, 0.5], [-0.5, 0.5]]]]))


def test_keeps_the_promises_at_another_temperature():
    check_loss(CWD, temperature=0.5)


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        cwd(student, teacher)


def test_refuses_a_single_position():
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'b' \(4, 5, 1, 1\) has one position.*student 'a' \(4, 3, 4, 4\)"):
        cwd((3, 4, 4), (5, 1, 1))
