import math

import pytest
import torch
from naive_maps import convolved, pooled_alike

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

VID = registry.load().losses["vid"]
PAIR = [{"student": "a", "teacher": "b"}]


def vid(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = VID(VID.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    """Minus the log-density of a Gaussian, but for log(2 pi) / 2, one channel at a time."""
    mean, f_t = pooled_alike(student.features["a"], teacher.features["b"])
    first, _, second, _, third = loss.regressors[0]
    mean = convolved(convolved(convolved(mean, first).clamp_min(0), second).clamp_min(0), third)
    total = 0
    for channel, scale in enumerate(loss.scales[0].flatten()):
        variance = (1 + scale.exp()).log() + 1e-5
        density = torch.distributions.Normal(mean[:, channel], variance.sqrt()).log_prob(f_t[:, channel])
        total = total - (density + math.log(2 * math.pi) / 2).sum()
    return total / f_t.numel()


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 4, 4), (2, 7, 6)), ((3, 1, 1), (5, 1, 1))]


@pytest.mark.parametrize("variance", [5.0, 0.01])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes, variance):
    loss, *answers = vid(*shapes, size=size, initial_variance=variance)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = vid(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("variance", [1e-3, 0.5, 5.0, 1e4])
def test_begins_with_that_variance(variance):
    loss, student, teacher, batch = vid((3, 4, 4), (5, 4, 4), initial_variance=variance)
    found = torch.nn.functional.softplus(loss.scales[0]) + 1e-5
    torch.testing.assert_close(found, torch.full_like(found, variance))


def test_the_regressor_is_as_wide_as_the_teacher_and_has_no_bias():
    shapes = {name: tuple(p.shape) for name, p in vid((3, 4, 4), (5, 4, 4))[0].named_parameters()}
    assert list(shapes.values()) == [(5, 3, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1), (5, 1, 1)]


def test_the_best_variance_is_the_mean_squared_error():
    loss, student, teacher, batch = vid((3, 4, 4), (1, 4, 4))
    optimizer = torch.optim.Adam(loss.scales.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, teacher, batch).backward()
        optimizer.step()
    error = ((loss.regressors[0](student.features["a"]) - teacher.features["b"]) ** 2).mean()
    torch.testing.assert_close(torch.nn.functional.softplus(loss.scales[0]).squeeze() + 1e-5, error, rtol=1e-3, atol=0)


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    both, alone = VID(VID.Options(layers=layers)), []
    both.setup(student, teacher)
    for i, layer in enumerate(layers):
        one = VID(VID.Options(layers=[layer]))
        one.setup(student, teacher)
        one.regressors[0].load_state_dict(both.regressors[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES[:4])
def test_gradient(shapes):
    loss, student, teacher, batch = vid(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_a_vanishing_variance_stays_finite():
    loss, student, teacher, batch = vid((3, 4, 4), (5, 4, 4))
    torch.nn.init.constant_(loss.scales[0], -1e4)
    f = student.features["a"].requires_grad_()
    value = loss(student, teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_keeps_the_promises_with_another_variance():
    check_loss(VID, initial_variance=0.1)


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        vid(student, teacher)
