import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

PEFD = registry.load().losses["pefd"]
PAIR = [{"student": "a", "teacher": "b"}]


def pefd(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = PEFD(PEFD.Options(layers=PAIR, **options))
    s, t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def vectors(f):
    """One sample's mean over its positions."""
    return f if f.ndim == 1 else f.flatten(1).sum(1) / f[0].numel() if f.ndim == 3 else f.sum(0) / len(f)


def formula(loss, student, teacher, batch):
    """One sample and one projector at a time."""
    total, wide = 0, vectors(teacher.features["b"][0]).numel()
    for f_s, f_t in zip(student.features["a"], teacher.features["b"], strict=True):
        v_s, v_t, projected = vectors(f_s), vectors(f_t), 0
        for i in range(loss.options.projectors):
            rows = slice(i * wide, (i + 1) * wide)
            projected = projected + (loss.adapters[0].weight[rows] @ v_s + loss.adapters[0].bias[rows]).clamp_min(0)
        projected = projected / loss.options.projectors
        total = total + 1 - (projected * v_t).sum() / (projected.square().sum().sqrt() * v_t.square().sum().sqrt())
    return total / len(batch.labels)


SHAPES = [((3,), (5,)), ((6,), (6,)), ((3, 4, 4), (5, 2, 2)), ((7, 3), (9, 5)), ((3, 4, 4), (5,))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("projectors", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, projectors, shapes):
    loss, *given = pefd(*shapes, size=size, projectors=projectors)
    assert_agrees(loss, formula, *given)


def test_two_projectors_by_hand():
    """Projections (2, 0) and (0, 2) of the vector (1, -1): their mean (1, 1), and the teacher's (1, 0)."""
    loss, *_ = pefd((2,), (2,), size=1, projectors=2)
    with torch.no_grad():
        loss.adapters[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]]))
        loss.adapters[0].bias.zero_()
    student, teacher = (kdkit.Outputs(torch.zeros(1, 2), {name: torch.tensor([v])}) for name, v in (("a", [1.0, -1.0]), ("b", [1.0, 0.0])))
    assert loss(student, teacher, random_batch(1)).item() == pytest.approx(1 - 0.5**0.5)


@pytest.mark.parametrize("dead", ["projectors", "teacher"])
def test_without_a_direction_the_distance_is_one(dead):
    loss, student, teacher, batch = pefd((3,), (5,))
    with torch.no_grad():
        if dead == "projectors":
            loss.adapters[0].bias.fill_(-100.0)
        else:
            teacher.features["b"].zero_()
    student = student.map(lambda x: x.requires_grad_())
    value = loss(student, teacher, batch)
    value.backward()
    assert value.item() == 1 and not student.features["a"].grad.any()
    assert loss.adapters[0].weight.grad.isfinite().all()


def test_projectors_begin_apart_as_linear_layers_do():
    weight = pefd((100,), (50,))[0].adapters[0].weight.unflatten(0, (3, 50))
    assert not torch.equal(weight[0], weight[1]) and weight.abs().max().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("options", [{"projectors": 1}, {"projectors": 6}])
def test_keeps_the_promises_with_options(options):
    check_but(PEFD, **options)
