import math

import pytest
import torch
from pydantic import ValidationError

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

IRG = registry.load().losses["irg"]
PAIRS = [{"student": "a", "teacher": "c"}, {"student": "b", "teacher": "d"}]

# Shapes of two layers of the student, then of the teacher.
SHAPES = {
    "halved": ((2, 4, 4), (4, 2, 2), (4, 4, 4), (8, 2, 2)),
    "same": ((3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "any": ((3, 5, 4), (7, 2, 6), (5, 3, 3), (2, 7, 7)),
    "then vectors": ((3, 4, 4), (5,), (4, 2, 2), (7,)),
    "tokens": ((5, 3), (4, 3), (10, 4), (9, 6)),
    "vectors": ((3,), (6,), (4,), (5,)),
}


def answers(shapes, size):
    a, b, c, d = shapes
    return random_outputs({"a": a, "b": b}, size=size), random_outputs({"c": c, "d": d}, size=size, seed=1), random_batch(size)


def irg(layers=PAIRS, **options):
    return IRG(IRG.Options(layers=layers, **options))


def means(x, count, dim):
    """`count` means over windows that cover a dimension evenly."""
    n = x.shape[dim]
    windows = [x.narrow(dim, i * n // count, math.ceil((i + 1) * n / count) - i * n // count) for i in range(count)]
    return torch.stack([window.mean(dim) for window in windows], dim)


def move(f, g):
    """Squared way of one sample between two layers."""
    f, g = (x[:, None, None] if x.ndim == 1 else kdkit.as_map(x[None])[0] for x in (f, g))
    for dim in range(3):
        f, g = (means(x, min(f.shape[dim], g.shape[dim]), dim) for x in (f, g))
    return ((f - g) ** 2).sum()


def over_largest(values):
    largest = max(values, key=torch.Tensor.item)
    return [value / largest for value in values]


def formula(loss, student, teacher, batch):
    """Every pair of samples by itself; one sample has only its answers."""
    o, n = loss.options, len(batch.classes)
    sides = [[student.features[p.student] for p in o.layers], [teacher.features[p.teacher] for p in o.layers]]
    total = o.vertex * ((student.logits - teacher.logits) ** 2).sum() / student.logits.numel() if o.vertex else 0 * student.logits.sum()
    for f_s, f_t in zip(*sides, strict=True) if n > 1 else ():
        e_s, e_t = (over_largest([((x - y) ** 2).sum() for x in f for y in f]) for f in (f_s, f_t))
        total = total + o.edge * sum((s - t) ** 2 for s, t in zip(e_s, e_t, strict=True)) / n**2 / len(o.layers)
    for step in range(len(o.layers) - 1) if n > 1 and o.transformation else ():
        t_s, t_t = (over_largest([move(layers[step][i], layers[step + 1][i]) for i in range(n)]) for layers in sides)
        errors = [(s - t) ** 2 for s, t in zip(t_s, t_t, strict=True)]
        total = total + o.transformation * sum(errors) / n / (len(o.layers) - 1)
    return total


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", [{}, {"vertex": 0, "edge": 1}, {"transformation": 0}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_is_the_formula(size, options, shapes):
    assert_agrees(irg(**options), formula, *answers(shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(irg(), formula, *answers(((2, 2, 2), (4,), (3,), (5,)), 64))


def test_is_the_formula_on_three_layers_to_the_logits():
    student, teacher, batch = answers(SHAPES["halved"], 4)
    student, teacher = (kdkit.Outputs(side.logits, {**side.features, "logits": side.logits}) for side in (student, teacher))
    assert_agrees(irg([*PAIRS, {"student": "logits", "teacher": "logits"}]), formula, student, teacher, batch)


def test_three_points_by_hand():
    """Squared distances 9, 16, 25 over 25 against three equal ones; ways 0, 9, 16 over 16 against three equal ones; alike logits."""
    f, z = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), torch.zeros(3, 5)
    student = kdkit.Outputs(z, {"a": f, "b": 0 * f})
    teacher = kdkit.Outputs(z, {"c": torch.eye(3), "d": 0 * f})
    edges = 2 * ((9 / 25 - 1) ** 2 + (16 / 25 - 1) ** 2) / 9 / 2  # the second layers' distances are all 0
    ways = (1 + (9 / 16 - 1) ** 2) / 3
    layers = [PAIRS[0], {"student": "b", "teacher": "d"}]
    assert irg(layers, edge=2, transformation=0)(student, teacher, random_batch(3)).item() == pytest.approx(2 * edges)
    teacher = kdkit.Outputs(z, {"c": torch.eye(3), "d": torch.zeros(3, 3)})
    assert irg(layers, edge=0, transformation=3)(student, teacher, random_batch(3)).item() == pytest.approx(3 * ways)


def test_the_ways_scale_does_not_matter():
    student, teacher, batch = answers(SHAPES["same"], 6)
    alike = kdkit.Outputs(student.logits, {"c": 5 * student.features["a"], "d": 5 * student.features["b"]})
    assert irg()(student, alike, batch).item() == pytest.approx(0, abs=1e-9)
    assert irg()(student, teacher, batch).item() > 1e-2


def test_one_sample_gives_exactly_nothing_but_its_answer():
    student, teacher, batch = answers(SHAPES["halved"], 1)
    a, b = (student.features[key].requires_grad_() for key in "ab")
    value = irg(vertex=0)(kdkit.Outputs(student.logits, {"a": a, "b": b}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("scale", [0, 1e-12, 1e-7, 1e-5, 1e-3])
def test_faint_features_have_bounded_gradients(scale):
    student, teacher, batch = answers(SHAPES["halved"], 4)
    a, b = ((scale * student.features[key]).requires_grad_() for key in "ab")
    irg()(kdkit.Outputs(student.logits, {"a": a, "b": b}), teacher, batch).backward()
    assert all(f.grad.isfinite().all() and f.grad.abs().max() < 1e6 for f in (a, b))


@pytest.mark.parametrize("name", ["halved", "any", "then vectors"])
def test_gradient(name):
    student, teacher, batch = answers(SHAPES[name], 3)
    a, b, z = (x.double().requires_grad_() for x in (*student.features.values(), student.logits))
    loss, teacher = irg(), teacher.map(torch.Tensor.double)
    assert torch.autograd.gradcheck(lambda a, b, z: loss(kdkit.Outputs(z, {"a": a, "b": b}), teacher, batch), (a, b, z))


def test_keeps_the_promises_down_to_the_logits():
    pairs = [{"student": name, "teacher": name} for name in ("a", "b", "logits")]
    check_loss(IRG, layers=pairs, vertex=1.0)


def test_needs_two_layers():
    with pytest.raises(ValidationError, match="at least 2 items"):
        irg(PAIRS[:1])


def test_refuses_layers_without_a_grid_unless_ways_do_not_count():
    student, teacher, _ = answers(((15, 3), (3,), (9, 3), (3,)), 4)
    with pytest.raises(
        kdkit.ShapeError, match=r"student 'a' \(4, 15, 3\) and teacher 'c' \(4, 9, 3\) must be maps .* set `transformation` to 0"
    ):
        irg().setup(student, teacher)
    irg(transformation=0).setup(student, teacher)


def test_refuses_other_classes_unless_vertices_do_not_count():
    student, teacher = random_outputs({"a": (3,), "b": (3,)}), random_outputs({"c": (3,), "d": (3,)}, classes=7)
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        irg().setup(student, teacher)
    irg(vertex=0).setup(student, teacher)
