import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

SP = registry.load().losses["sp"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def formula(loss, student, teacher, batch):
    """Every pair of samples by itself; one sample has nothing to be similar to."""
    matrices, n = [], len(batch.classes)
    for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
        rows = [torch.stack([(f[i] * f[j]).sum() for j in range(n)]) for i in range(n)]
        matrices.append([row / (row**2).sum().sqrt() for row in rows])
    total = sum(((g_s - g_t) ** 2).sum() for g_s, g_t in zip(*matrices, strict=True)) / n**2
    return total if n > 1 else 0 * student.features["a"].sum()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_is_the_formula(size, shapes):
    assert_agrees(SP(SP.Options(layers=PAIR)), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(SP(SP.Options(layers=PAIR)), formula, *answers((3,), (5,), 64))


def test_unrelated_samples_against_equal_ones():
    """The rows are (1, 0) and (0, 1) against (1, 1) / sqrt 2 twice."""
    student, teacher = torch.eye(2), torch.ones(2, 3)
    value = SP(SP.Options(layers=PAIR))(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(2))
    assert value.item() == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4)


def test_neither_scale_nor_turns_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] @ turn})
    assert SP(SP.Options(layers=PAIR))(student, alike, batch).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("silent", [False, True])
def test_one_sample_gives_exactly_nothing(silent):
    student, teacher, batch = answers((3,), (5,), 1)
    f = (0 * student.features["a"] if silent else student.features["a"]).requires_grad_()
    value = SP(SP.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


def test_a_silent_sample_counts_but_has_no_slope_of_its_own():
    student, teacher, batch = answers((3,), (5,), 4)
    f = torch.cat([torch.zeros(1, 3), student.features["a"][1:]]).requires_grad_()
    value = SP(SP.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    g = [x @ x.T for x in (f.detach(), teacher.features["b"])]
    g = [rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) for rows in g]
    assert value.item() == pytest.approx((((g[0] - g[1]) ** 2).sum() / 16).item())
    assert f.grad.abs().max() < 1 and f.grad[1:].any()


def test_several_pairs_are_averaged():
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (3,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (SP(SP.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 5)
    f, loss = student.features["a"].double().requires_grad_(), SP(SP.Options(layers=PAIR))
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        SP(SP.Options(layers=PAIR)).setup(student, teacher)
