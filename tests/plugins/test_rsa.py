import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_survives_degenerate_inputs, random_batch, random_outputs

RSA = registry.load().losses["rsa"]
PAIR = [{"student": "a", "teacher": "b"}]


def answers(student, teacher, count):
    return random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1), random_batch(count)


def unlike(x, y, distance):
    if distance == "cosine":
        return 1 - x @ y / ((x @ x).sqrt() * (y @ y).sqrt())
    return ((x - y) ** 2).sum().sqrt()


def formula(loss, student, teacher, batch):
    """The strict upper triangles, one entry after the other."""
    tables = []
    for f in (student.features["a"].flatten(1), teacher.features["b"].flatten(1)):
        if len(f) < 3:
            return 0 * student.features["a"].sum()
        tables.append(torch.stack([unlike(f[i], f[j], loss.options.distance) for i in range(len(f)) for j in range(i + 1, len(f))]))
    s, t = (table - table.mean() for table in tables)
    return 1 - (s @ t) / ((s @ s) * (t @ t)).sqrt()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("shapes", [((3,), (5,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_is_the_formula(count, shapes, distance):
    assert_agrees(RSA(RSA.Options(layers=PAIR, distance=distance)), formula, *answers(*shapes, count))


def test_the_sign_is_that_of_the_correlation():
    """Three samples on a line, at 0, 1 and 3, against the same in the order of distances reversed."""
    f_s, f_t = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.5, 0.5]])
    loss = RSA(RSA.Options(layers=PAIR, distance="euclidean"))
    own = [kdkit.Outputs(f, {"a": f, "b": f}) for f in (f_s, f_t)]
    assert loss(own[0], own[0], random_batch(3)).item() == pytest.approx(0, abs=1e-6)
    s, t = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3.0, 2.5**0.5, 2.5**0.5])
    wanted = 1 - torch.corrcoef(torch.stack([s, t]))[0, 1]
    assert wanted > 1
    torch.testing.assert_close(loss(*own, random_batch(3)), wanted)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("scale", [0, 1e-12, 1e-7, 2e-6, 1e-4, 6e4])
def test_gradients_are_bounded_at_every_scale(scale, distance):
    student, teacher, batch = answers((3,), (5,), 4)
    f = (scale * student.features["a"]).requires_grad_()
    RSA(RSA.Options(layers=PAIR, distance=distance))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_keeps_the_promises_with_distances():
    check_survives_degenerate_inputs(RSA, distance="euclidean")
