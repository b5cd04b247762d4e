import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_survives_degenerate_inputs, random_batch, random_outputs

ITRD = registry.load().losses["itrd"]
PAIR = [{"student": "a", "teacher": "b"}]


def itrd(student=(6,), teacher=(10,), count=5, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = ITRD(ITRD.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def pooled(f):
    return f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))


def standard(unit):
    deviation = ((unit - unit.mean()) ** 2).sum() / (len(unit) - 1)
    return (unit - unit.mean()) / (deviation + 1e-6).sqrt()


def gram(e):
    rows = [row / (row @ row).sqrt() for row in e]
    return torch.stack([torch.stack([x @ y for y in rows]) for x in rows])


def formula(loss, student, teacher, batch):
    """Unit by unit and pair by pair, with the traces; where the widths agree, relations are those of the bare embeddings."""
    o, (adapter,) = loss.options, loss.adapters
    s, t = pooled(student.features["a"]), pooled(teacher.features["b"])
    mapped = s @ adapter.weight.T + (0 if adapter.bias is None else adapter.bias)
    total = 0
    for d in range(t.shape[1]):
        c = (standard(mapped[:, d]) * standard(t[:, d])).sum() / len(s)
        total = total + ((c - 1) ** 2) ** o.alpha
    g_s = gram(s if s.shape[1] == t.shape[1] else mapped)
    g_st = g_s * gram(t)
    mutual = ((g_s / g_s.trace()) ** 2 - (g_st / g_st.trace()) ** 2).sum()
    return o.correlation * total.log() / math.log(2) + o.mutual * mutual


@pytest.mark.parametrize("options", [{}, {"alpha": 1.01}, {"alpha": 0.5, "mutual": 1.0}, {"correlation": 0.0, "mutual": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("shapes", "count"), [(((6,), (10,)), 5), (((6,), (6,)), 3), (((6, 4, 4), (9, 10)), 2), (((6,), (10,)), 32)], ids=str
)
def test_is_the_formula(shapes, count, options):
    loss, *given = itrd(*shapes, count, **options)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("count", [4, 64])
def test_equal_units_reach_the_minimum(count):
    """Each correlation is (N - 1) / N, as the deviation is unbiased: log2 of D N^(-2 alpha)."""
    loss, _, teacher, batch = itrd((10,), (10,), count, correlation=1.0, mutual=0.0)
    with torch.no_grad():
        loss.adapters[0].weight.copy_(2 * torch.eye(10))
    f = teacher.features["b"].clone().requires_grad_()
    value = loss(kdkit.Outputs(teacher.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == pytest.approx(math.log2(10 * count**-3), rel=1e-3)
    assert f.grad.abs().max() < 1e-3


def test_relations_are_those_of_orthogonal_images_at_least():
    """Four images at right angles: only the diagonals are there, and they are equal."""
    loss, *_ = itrd((4,), (4,), 4, correlation=0.0, mutual=1.0)
    eye, ones = torch.eye(4), torch.ones(4, 4)
    answers = [kdkit.Outputs(f, {"a": f, "b": f}) for f in (eye, ones)]
    assert loss(answers[0], answers[1], random_batch(4)).item() == pytest.approx(0)
    assert loss(answers[1], answers[0], random_batch(4)).item() == pytest.approx((16 - 4) / 16)


def test_a_teachers_unit_that_does_not_vary_drops_out():
    loss, student, teacher, batch = itrd(mutual=0.0)
    f_t = teacher.features["b"].clone()
    f_t[:, 3] = 0.1
    value = loss(student, kdkit.Outputs(teacher.logits, {"b": f_t}), batch)
    kept = [d for d in range(10) if d != 3]
    with torch.no_grad():
        loss.adapters[0].weight = torch.nn.Parameter(loss.adapters[0].weight[kept])
        loss.adapters[0].bias = torch.nn.Parameter(loss.adapters[0].bias[kept])
    torch.testing.assert_close(loss(student, kdkit.Outputs(teacher.logits, {"b": f_t[:, kept]}), batch), value)


@pytest.mark.parametrize("count", [1, 5])
def test_nothing_that_varies_gives_exactly_nothing(count):
    loss, student, teacher, batch = itrd(count=count)
    f = student.features["a"].requires_grad_()
    same = teacher.map(lambda x: x[:1].expand_as(x))
    value = loss(kdkit.Outputs(student.logits, {"a": f}), same, batch)
    value.backward()
    assert (value.item() == 0 and not f.grad.any()) if count == 1 else abs(value.item()) < 1e-6


def test_a_dead_unit_of_the_student_is_finite():
    loss, student, teacher, batch = itrd((10,), (10,))
    f = (student.features["a"] * (torch.arange(10) > 0)).requires_grad_()
    with torch.no_grad():
        loss.adapters[0].weight.copy_(torch.eye(10))
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e4


def test_keeps_the_promises_at_the_least_order():
    check_survives_degenerate_inputs(ITRD, alpha=0.5, mutual=1.0)
