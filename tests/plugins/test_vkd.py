import sys

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

VKD = registry.load().losses["vkd"]
PAIR = [{"student": "a", "teacher": "b"}]


def vkd(student, teacher, size=4, turned=True, **options):
    """The loss, set up, with a projection that has learnt something, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = VKD(VKD.Options(layers=PAIR, **options))
    s, t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    loss.setup(s, t)
    if turned:
        torch.nn.init.normal_(loss.projections[0].skew)
    return loss, s, t, random_batch(size)


def vectors(f):
    """One sample's mean over its positions."""
    return f if f.ndim == 1 else f.flatten(1).sum(1) / f[0].numel() if f.ndim == 3 else f.sum(0) / len(f)


def projection(part):
    """The Cayley transform, with an inverse instead of a linear system."""
    wide, narrow = part.skew.shape
    skew = torch.zeros(wide, wide, dtype=part.skew.dtype)
    for i in range(wide):
        for j in range(min(i, narrow)):
            skew[i, j], skew[j, i] = part.skew[i, j], -part.skew[i, j]
    one = torch.eye(wide, dtype=skew.dtype)
    matrix = part.start @ ((one + skew).inverse() @ (one - skew))[:, :narrow]
    return matrix if part.widens else matrix.T


def normalised(v, how):
    if how == "layer_norm":
        return (v - v.mean(1, keepdim=True)) / (v.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    centred = v - v.mean(0)
    values, columns = torch.linalg.eigh(centred.T @ centred / len(v))
    return centred @ columns @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ columns.T


def formula(loss, student, teacher, batch):
    o, total = loss.options, 0
    v_s, v_t = (torch.stack([vectors(f) for f in answer.features[name]]) for answer, name in ((student, "a"), (teacher, "b")))
    matrix, target = projection(loss.projections[0]), normalised(v_t, o.normalise)
    for row, wanted in zip(v_s, target, strict=True):
        d = (matrix @ row - wanted).abs()
        total = total + torch.where(d < o.beta, d.square() / (2 * o.beta), d - o.beta / 2).sum()
    return total / target.numel()


SHAPES = [((3,), (5,)), ((5,), (3,)), ((6,), (6,)), ((3, 4, 4), (5, 2, 2)), ((7, 3), (9, 5))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, beta, shapes):
    loss, *given = vkd(*shapes, size=size, beta=beta)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [2, 4, 64])
def test_is_the_formula_with_whitening(size, shapes):
    loss, *given = vkd(*shapes, size=size, normalise="whiten")
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize(("width", "wanted"), [(3, 8), (8, 3), (5, 5), (1, 4)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_the_projection_stays_orthogonal(width, wanted, scale):
    part = vkd((width,), (wanted,))[0].projections[0].double()
    with torch.no_grad():
        part.skew.mul_(scale)
    matrix = part.weight()
    assert matrix.shape == (wanted, width)
    narrow = matrix.T @ matrix if wanted >= width else matrix @ matrix.T
    torch.testing.assert_close(narrow, torch.eye(min(width, wanted), dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_projection_begins_at_random_and_learns():
    loss, student, teacher, batch = vkd((4,), (6,), turned=False)
    part = loss.projections[0]
    torch.testing.assert_close(part.weight(), part.start[:, :4])
    loss(student, teacher, batch).backward()
    # as many as an orthogonal map of 4 in 6 has freedoms
    assert part.skew.grad.count_nonzero() == 6 * 4 - 4 * 5 // 2


def test_a_student_that_is_the_turned_teacher_has_distance_zero():
    loss, _, teacher, batch = vkd((6,), (6,))
    target = torch.nn.functional.layer_norm(teacher.features["b"], (6,))
    student = kdkit.Outputs(teacher.logits, {"a": target @ loss.projections[0].weight().detach()})
    assert loss(student, teacher, batch).item() == pytest.approx(0, abs=1e-10)


def test_whitened_channels_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    correlated = torch.randn(400, 5, generator=generator) @ (torch.eye(5) + 0.5 * torch.ones(5, 5)) + 7
    target = sys.modules[VKD.__module__].whitened(correlated)
    torch.testing.assert_close(torch.cov(target.T, correction=0), torch.eye(5), atol=0.02, rtol=0)
    torch.testing.assert_close(target.mean(0), torch.zeros(5), atol=1e-5, rtol=0)


def test_one_sample_is_not_whitened():
    loss, student, teacher, batch = vkd((3,), (5,), size=1, normalise="whiten")
    student = student.map(lambda x: x.requires_grad_())
    value = loss(student, teacher, batch)
    value.backward()
    assert value.item() == 0 and not student.features["a"].grad.any()


@pytest.mark.parametrize("options", [{"normalise": "whiten"}, {"beta": 0.1}])
def test_keeps_the_promises_with_options(options):
    check_but(VKD, **options)
