import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import random_batch, random_outputs
from kdkit.testing.outputs import of_texts


@pytest.fixture(scope="module")
def phi():
    registry.load()  # makes the plugins' own modules importable
    from kdkit_plugins.feature import _phi_s

    return _phi_s


def features(size, count=300, shift=3.0):
    """Vectors whose dimensions depend on one another and differ in size."""
    generator = torch.Generator().manual_seed(size)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, size, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + shift


def standardised(phi, x):
    part = phi.PhiS(torch.tensor([float(len(x))]), x.sum(0), x.T @ x)
    return part, part(x)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 16, 20, 24, 40, 48, 192, 384, 768])
def test_a_hadamard_matrix_has_orthogonal_rows_of_1_and_minus_1(size, phi):
    found = phi.hadamard(size)
    assert (found.abs() == 1).all()
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 5, 6, 10, 28, 100])
def test_other_sizes_have_a_rotation_that_is_always_the_same(size, phi):
    assert phi.hadamard(size) is None
    found = phi.rotation(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(found, phi.rotation(size))


@pytest.mark.parametrize("size", [1, 2, 12, 16, 24])
def test_each_dimension_has_mean_0_and_variance_1(size, phi):
    _, y = standardised(phi, features(size))
    torch.testing.assert_close(y.mean(0), torch.zeros(size, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [5, 12])
def test_distances_change_by_one_factor(size, phi):
    """That of the mean variance: the definition, from the covariance itself."""
    x = features(size)
    part, y = standardised(phi, x)
    scale = (x - x.mean(0)).square().sum(1).mean().div(size).sqrt()
    torch.testing.assert_close(torch.pdist(y) * scale, torch.pdist(x))
    back = y @ torch.linalg.inv(part.matrix).T + part.mean
    torch.testing.assert_close(back, x)


def test_is_the_definition(phi):
    """H U' (x - mean) / sqrt(mean eigenvalue), one vector at a time; an eigenvector's sign is free."""
    x = features(4)
    part, y = standardised(phi, x)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    h = torch.tensor([[1.0, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]], dtype=torch.float64) / 2
    assert torch.equal(phi.rotation(4), h)
    signs = torch.stack([v[v.abs().argmax()].sign() for v in vectors.T])
    for one, given in zip(y[:5], x[:5], strict=True):
        torch.testing.assert_close(one, h @ (signs * (vectors.T @ (given - x.mean(0)))) / values.mean().sqrt())


def test_features_that_do_not_vary_are_zeros(phi):
    _, y = standardised(phi, torch.full((5, 4), 7.0, dtype=torch.float64))
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize(
    ("shape", "as_map", "count"), [((4,), False, 12), ((4, 2, 3), False, 72), ((9, 4), False, 108), ((10, 4), True, 108)]
)
def test_moments_are_sums_over_positions(shape, as_map, count, phi):
    answers = [(random_outputs({"b": shape}, seed=seed), random_batch()) for seed in (1, 2)]
    found = phi.moments(answers, [as_map])
    x = torch.cat([outputs.features["b"] for outputs, _ in answers]).double()
    x = x[:, 1:] if as_map else x  # without the class token
    x = x.flatten(0, -2) if x.ndim < 4 else torch.stack([x[:, :, i, j] for i in range(2) for j in range(3)]).flatten(0, 1)
    assert found["b count"].item() == count
    torch.testing.assert_close(found["b total"], x.sum(0))
    torch.testing.assert_close(found["b products"], sum(v[:, None] * v for v in x))


def test_padding_of_texts_is_left_out(phi):
    outputs = of_texts(random_outputs({"b": (5, 4)}), 5)
    found = phi.moments([(outputs, random_batch())], [False])
    torch.testing.assert_close(found["b total"], outputs.features["b"][outputs.mask].double().sum(0))


def test_dense_mse_learns_standardised_layers(phi):
    """Each teacher layer by its own statistics, which are not saved."""
    dense = registry.load().losses["dense_mse"]
    layers = [{"student": "a", "teacher": name} for name in "bc"]
    seen = [(random_outputs({"b": (9, 4), "c": (9, 8)}, size=20, seed=5).map(lambda x: 9 * x + 2), random_batch(20))]
    context = kdkit.Context(torch.nn.Identity(), torch.nn.Identity(), 5, 0, torch.empty(0), survey=lambda network, survey: survey.of(seen))
    loss = dense(dense.Options(layers=layers, standardize_teacher="phi_s"))
    student = random_outputs({"a": (9, 3)}, size=20)
    loss.setup(student, seen[0][0], context)
    _, f_t = loss.joined(student, seen[0][0])
    torch.testing.assert_close(f_t.flatten(0, 1).var(0, correction=0), torch.ones(12), rtol=1e-4, atol=0)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"projector"}
    with pytest.raises(kdkit.ShapeError, match=r"give setup a kdkit\.Context"):
        dense(dense.Options(layers=layers, standardize_teacher="phi_s")).setup(student, seen[0][0])
