import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import (
    LOSS_CHECKS,
    assert_agrees,
    check_averages_over_the_batch,
    check_takes_rounded_inputs,
    random_batch,
    random_outputs,
)

DarkRank = registry.load().losses["darkrank"]
PAIR = [{"student": "a", "teacher": "b"}]
SHAPES = [((3,), (3,)), ((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


def darkrank(**options):
    return DarkRank(DarkRank.Options(layers=PAIR, **options))


def formula(loss, student, teacher, batch):
    """One sample and one rank at a time."""
    o, n = loss.options, len(batch.classes)
    f_s, f_t = student.features["a"].flatten(1), teacher.features["b"].flatten(1)
    if o.normalize:
        f_s, f_t = (f / (f**2).sum(1, keepdim=True).sqrt() for f in (f_s, f_t))
    total = 0 * f_s.sum()
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: ((f_t[i] - f_t[j]) ** 2).sum().item())[: o.length]  # noqa: B023
        scores = [-o.alpha * ((f_s[i] - f_s[j]) ** 2).sum().sqrt() ** o.beta for j in others]
        for k, score in enumerate(scores):
            total = total - (score - torch.stack(scores[k:]).logsumexp(0))
    return total / n


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"alpha": 0.5, "beta": 1.0, "length": 3}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_is_the_formula(size, shapes, options):
    assert_agrees(darkrank(**options), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(darkrank(), formula, *answers((3,), (5,), 64))


def test_is_the_formula_on_all_samples():
    assert_agrees(darkrank(length=64), formula, *answers((3,), (5,), 16))


def test_three_samples_by_hand():
    """On a line: the student has them at 0, 1, 3, the teacher at 0, 3, 1, so that only the middle one's neighbours keep their order."""
    f, t = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [3.0], [1.0]])
    value = darkrank(alpha=0.5, beta=2)(kdkit.Outputs(f, {"a": f}), kdkit.Outputs(t, {"b": t}), random_batch(3))
    # half the student's squared distances, to whom the teacher has nearer, less those to whom it has farther
    margins = (9 - 1) / 2, (4 - 1) / 2, (9 - 4) / 2
    assert value.item() == pytest.approx(sum(math.log(1 + math.exp(margin)) for margin in margins) / 3)


def test_the_right_order_far_apart_is_nothing():
    t = torch.tensor([[0.0], [1.0], [2.5], [5.5]])
    value = darkrank(alpha=50.0)(kdkit.Outputs(t, {"a": t}), kdkit.Outputs(t, {"b": 3 * t}), random_batch(4))
    assert value.item() == pytest.approx(0, abs=1e-6)


def test_unit_length_makes_scale_of_no_matter():
    student, teacher, batch = answers((3,), (5,), 8)
    far = kdkit.Outputs(student.logits, {"a": student.features["a"] * torch.arange(1.0, 9.0)[:, None]})
    torch.testing.assert_close(darkrank(normalize=True)(far, teacher, batch), darkrank(normalize=True)(student, teacher, batch))


@pytest.mark.parametrize("size", [1, 2])
def test_samples_of_one_order_give_exactly_nothing(size):
    student, teacher, batch = answers((3,), (5,), size)
    f = student.features["a"].requires_grad_()
    value = darkrank()(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


@pytest.mark.parametrize("alpha", [0.01, 3.0, 100.0])
@pytest.mark.parametrize("beta", [1.0, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_slopes_are_bounded_at_every_scale(scale, beta, alpha):
    student, teacher, batch = answers((6,), (6,), 16)
    f = (scale * student.features["a"]).requires_grad_()
    value = darkrank(alpha=alpha, beta=beta)(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_a_score_goes_on_along_its_tangent():
    d = torch.tensor([10.0, 105.0, 106.0, 1e6], dtype=torch.float64, requires_grad=True)
    far = (1e5 / 9) ** 0.5
    scores = darkrank().scores(d)
    torch.testing.assert_close(scores[:1], -3 * d[:1] ** 3)
    torch.testing.assert_close(scores[2:], -3 * far**3 - 1e5 * (d[2:] - far))
    (slope,) = torch.autograd.grad(scores.sum(), d)
    torch.testing.assert_close(slope, torch.tensor([-900.0, -9 * 105.0**2, -1e5, -1e5], dtype=torch.float64))


def test_several_pairs_are_averaged():
    student, teacher = random_outputs({"a": (3, 4, 4), "c": (3,)}), random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (
        DarkRank(DarkRank.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:])
    )
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=str)
def test_gradient(options, shapes):
    student, teacher, batch = answers(*shapes, 5)
    f, loss = student.features["a"].double().requires_grad_(), darkrank(**options)
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


OTHERS = [check for check in LOSS_CHECKS if check not in (check_takes_rounded_inputs, check_averages_over_the_batch)]


@pytest.mark.parametrize("check", OTHERS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", [{"normalize": True}, {"beta": 1.0, "length": 64}], ids=str)
def test_keeps_the_promises_with_other_options(options, check):
    """All but one: rounding turns the order of two that are as near to each other, and at unit length noise is all as near."""
    check(DarkRank, **options)


def test_refuses_another_number_of_samples():
    student, teacher = random_outputs({"a": (3,)}), random_outputs({"b": (3,)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'b' \(4, 3\)"):
        darkrank().setup(student, teacher)
