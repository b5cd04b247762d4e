import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

CC = registry.load().losses["cc"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def formula(loss, student, teacher, batch):
    """Each sample's correlations by themselves, power by power; one sample has nothing to correlate with."""
    o, n, tables = loss.options, len(batch.classes), []
    factors = [math.exp(-2 * o.gamma) * (2 * o.gamma) ** p / math.factorial(p) for p in range(o.order + 1)]
    for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
        unit = [x / (x**2).sum().sqrt() for x in f]
        cosines = [torch.stack([(x * y).sum() for y in unit]) for x in unit]
        tables.append([sum(factor * row**p for p, factor in enumerate(factors)) for row in cosines])
    total = sum(((k_s - k_t) ** 2).sum() for k_s, k_t in zip(*tables, strict=True)) / n**2
    return total if n > 1 else 0 * student.features["a"].sum()


@pytest.mark.parametrize("options", [{}, {"order": 1}, {"order": 5, "gamma": 1.5}])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_is_the_formula(size, shapes, options):
    assert_agrees(CC(CC.Options(layers=PAIR, **options)), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(CC(CC.Options(layers=PAIR)), formula, *answers((3,), (5,), 64))


def test_many_orders_are_the_gaussian_kernel():
    student, teacher, batch = answers((3,), (5,), 8)
    x, y = (f / f.norm(dim=1, keepdim=True) for f in (student.features["a"], teacher.features["b"]))
    kernels = [torch.exp(-0.7 * torch.cdist(f, f) ** 2) for f in (x, y)]
    value = CC(CC.Options(layers=PAIR, gamma=0.7, order=16))(student, teacher, batch)
    torch.testing.assert_close(value, ((kernels[0] - kernels[1]) ** 2).mean())


def test_unrelated_samples_against_equal_ones():
    """Off the diagonal the cosines are 0 and 1; gamma 0.5 makes the orders' factors 1, 1 and 1/2, over e."""
    student, teacher = torch.eye(2), torch.ones(2, 3)
    loss = CC(CC.Options(layers=PAIR, gamma=0.5))
    value = loss(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(2))
    assert value.item() == pytest.approx(1.5**2 / math.e**2 / 2)


def test_neither_scale_nor_turns_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] @ turn})
    assert CC(CC.Options(layers=PAIR))(student, alike, batch).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("scale", [0, 1])
def test_one_sample_gives_exactly_nothing(scale):
    student, teacher, batch = answers((3,), (5,), 1)
    f = (scale * student.features["a"]).requires_grad_()
    value = CC(CC.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


def test_a_silent_sample_has_no_slope():
    student, teacher, batch = answers((3,), (5,), 4)
    f = torch.cat([torch.zeros(1, 3), student.features["a"][1:]]).requires_grad_()
    value = CC(CC.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    cosines = [x @ x.T for x in (torch.nn.functional.normalize(x) for x in (f.detach(), teacher.features["b"]))]
    s, t = (math.exp(-0.8) * (1 + 0.8 * c + 0.32 * c**2) for c in cosines)
    assert value.item() == pytest.approx(((s - t) ** 2).mean().item())
    assert not f.grad[0].any() and f.grad[1:].any() and f.grad.abs().max() < 1


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 2e-6, 1e-4])
def test_faint_features_have_bounded_gradients(scale):
    student, teacher, batch = answers((3,), (5,), 4)
    f = (scale * student.features["a"]).requires_grad_()
    CC(CC.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_several_pairs_are_averaged():
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (3,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (CC(CC.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 5)
    f, loss = student.features["a"].double().requires_grad_(), CC(CC.Options(layers=PAIR))
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


def test_keeps_the_promises_with_a_sharp_kernel():
    check_loss(CC, gamma=10.0, order=16)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        CC(CC.Options(layers=PAIR)).setup(student, teacher)
