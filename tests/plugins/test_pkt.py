import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

PKT = registry.load().losses["pkt"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def formula(loss, student, teacher, batch):
    """Each sample's neighbours by themselves."""
    tables, n = [], len(batch.classes)
    for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
        unit = torch.stack([x / ((x**2).sum().sqrt() + 1e-7) for x in f])
        rows = [torch.stack([(x * y).sum() for y in unit]) / 2 + 0.5 for x in unit]
        tables.append([row / row.sum() for row in rows])
    return sum((t * ((t + 1e-7) / (s + 1e-7)).log()).sum() for s, t in zip(*tables, strict=True)) / n**2


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_is_the_formula(size, shapes):
    assert_agrees(PKT(PKT.Options(layers=PAIR)), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(PKT(PKT.Options(layers=PAIR)), formula, *answers((3,), (5,), 64))


def test_unrelated_samples_against_equal_ones():
    """The student's rows are (2/3, 1/3) and (1/3, 2/3), the teacher's (1/2, 1/2) twice."""
    student, teacher = torch.eye(2), torch.ones(2, 3)
    value = PKT(PKT.Options(layers=PAIR))(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(2))
    assert value.item() == pytest.approx((0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)) / 2, rel=1e-5)


def test_neither_scale_nor_turns_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] @ turn})
    assert PKT(PKT.Options(layers=PAIR))(student, alike, batch).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("scale", [0, 1e-7, 1, 1e4])
def test_one_sample_gives_exactly_nothing(scale):
    student, teacher, batch = answers((3,), (5,), 1)
    f = (scale * student.features["a"]).requires_grad_()
    value = PKT(PKT.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


def test_a_silent_sample_is_as_near_to_all_and_has_no_slope():
    student, teacher, batch = answers((3,), (5,), 4)
    f = torch.cat([torch.zeros(1, 3), student.features["a"][1:]]).requires_grad_()
    value = PKT(PKT.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    cosines = [torch.nn.functional.normalize(x) for x in (f.detach(), teacher.features["b"])]
    s, t = ((1 + x @ x.T) / 2 for x in cosines)
    s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    assert value.item() == pytest.approx((t * (t / s).log()).mean().item(), rel=1e-4)
    assert not f.grad[0].any() and f.grad[1:].any() and f.grad.abs().max() < 1


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 2e-6, 1e-4])
def test_faint_features_have_bounded_gradients(scale):
    student, teacher, batch = answers((3,), (5,), 4)
    f = (scale * student.features["a"]).requires_grad_()
    PKT(PKT.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_opposite_samples():
    """A cosine of -1 that rounding takes below it has no logarithm of less than 0."""
    x = torch.randn(16, 7, generator=torch.Generator().manual_seed(0))
    f, t = torch.cat([x, -3.3 * x]).requires_grad_(), torch.cat([x, x])
    value = PKT(PKT.Options(layers=PAIR))(kdkit.Outputs(f, {"a": f}), kdkit.Outputs(t, {"b": t}), random_batch(32))
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_several_pairs_are_averaged():
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (3,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (PKT(PKT.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 5)
    f, loss = student.features["a"].double().requires_grad_(), PKT(PKT.Options(layers=PAIR))
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        PKT(PKT.Options(layers=PAIR)).setup(student, teacher)
