import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

RKD = registry.load().losses["rkd_distance"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def formula(loss, student, teacher, batch):
    """Every pair by itself, differences taken before squaring."""
    matrices, n = [], len(batch.classes)
    for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
        d = {(i, j): ((f[i] - f[j]) ** 2).sum().clamp_min(1e-12).sqrt() for i in range(n) for j in range(n) if i != j}
        mean = sum(d.values()) / max(len(d), 1)
        matrices.append({pair: value / mean for pair, value in d.items()})
    total = 0 * student.features["a"].sum()
    for pair, d_s in matrices[0].items():
        gap = (d_s - matrices[1][pair]).abs()
        total = total + (gap**2 / 2 if gap < 1 else gap - 0.5)
    return total / n**2


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_is_the_formula(size, shapes):
    assert_agrees(RKD(RKD.Options(layers=PAIR)), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(RKD(RKD.Options(layers=PAIR)), formula, *answers((3,), (5,), 64))


def test_is_the_formula_far_from_the_origin_and_with_an_outlier():
    student, teacher, batch = answers((6,), (5,), 8)
    far = kdkit.Outputs(student.logits, {"a": torch.cat([40 * student.features["a"][:1], student.features["a"][1:]]) + 300})
    assert_agrees(RKD(RKD.Options(layers=PAIR)), formula, far, teacher, batch)


def test_three_points_by_hand():
    """Distances 3, 4, 5 over their mean 4, against three equal ones; nine entries, three of them the diagonal."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.eye(3)
    value = RKD(RKD.Options(layers=PAIR))(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(3))
    assert value.item() == pytest.approx(2 * (0.25**2 / 2 + 0 + 0.25**2 / 2) / 9)


def test_neither_scale_nor_place_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] - 3})
    assert RKD(RKD.Options(layers=PAIR))(student, alike, batch).item() == pytest.approx(0, abs=1e-10)


def test_one_sample_gives_exactly_nothing():
    student, teacher, batch = answers((3,), (5,), 1)
    f = student.features["a"].requires_grad_()
    value = RKD(RKD.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


def test_equal_rows_have_no_pull():
    """Their distance is a constant; all that moves them is the others and the mean, alike for both."""
    student, teacher, batch = answers((3,), (5,), 5)
    f = torch.cat([student.features["a"][:1], student.features["a"][:1], student.features["a"][2:]]).double().requires_grad_()
    RKD(RKD.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 10


def test_several_pairs_are_averaged():
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (3,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (RKD(RKD.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    student, teacher, batch = answers(*shapes, 5)
    f, loss = student.features["a"].double().requires_grad_(), RKD(RKD.Options(layers=PAIR))
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        RKD(RKD.Options(layers=PAIR)).setup(student, teacher)
