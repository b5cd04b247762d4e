import pytest
import torch
import torch.nn.functional as F

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_adapters_learn, check_teaches_the_student, random_batch, random_outputs

Review = registry.load().losses["review"]
PAIRS = {
    "three stages": [((3, 8, 8), (5, 8, 8)), ((4, 4, 4), (6, 4, 4)), ((6, 2, 2), (7, 2, 2))],
    "other sizes": [((3, 8, 8), (5, 4, 4)), ((4, 4, 4), (6, 8, 8))],
    "not square": [((3, 8, 6), (5, 4, 6)), ((6, 2, 4), (7, 2, 4))],
    "a vector last": [((3, 4, 4), (5, 4, 4)), ((6,), (7,))],
    "one": [((3, 6, 6), (5, 6, 6))],
}


def review(pairs, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    layers = [{"student": f"s{i}", "teacher": f"t{i}"} for i in range(len(pairs))]
    loss = Review(Review.Options(layers=layers, **{"width": 4, **options}))
    s = random_outputs({f"s{i}": pair[0] for i, pair in enumerate(pairs)}, size=size)
    t = random_outputs({f"t{i}": pair[1] for i, pair in enumerate(pairs)}, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    if x.numel() == x.shape[1]:  # the running ones
        mean, variance = torch.zeros_like(x), torch.ones_like(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def nearest(x, size):
    rows = torch.stack([x[:, :, i * x.shape[2] // size[0]] for i in range(size[0])], 2)
    return torch.stack([rows[..., j * x.shape[3] // size[1]] for j in range(size[1])], 3)


def window_means(f, level):
    (h, w), means = f.shape[2:], []
    for i in range(level):
        for j in range(level):
            window = f[:, :, i * h // level : -(-(i + 1) * h // level), j * w // level : -(-(j + 1) * w // level)]
            means.append(window.sum((2, 3)) / window[0, 0].numel())
    return torch.stack(means, 2)


def formula(loss, student, teacher, batch):
    total, deeper = 0, None
    for i in reversed(range(len(loss.fusions))):
        f, t = (x[:, :, None, None] if x.ndim == 2 else x for x in (student.features[f"s{i}"], teacher.features[f"t{i}"]))
        fusion = loss.fusions[i]
        x = normalised(torch.einsum("bchw,dc->bdhw", f, fusion.inner[0].weight[:, :, 0, 0]), fusion.inner[1])
        if deeper is not None:
            y, gate = nearest(deeper, x.shape[2:]), fusion.attention[0]
            z = torch.einsum("bchw,dc->bdhw", torch.cat([x, y], 1), gate.weight[:, :, 0, 0]) + gate.bias[:, None, None]
            z = 1 / (1 + torch.exp(-z))
            x = x * z[:, 0:1] + y * z[:, 1:2]
        deeper = nearest(x, t.shape[2:])
        guess = normalised(F.conv2d(deeper, fusion.outer[0].weight, padding=1), fusion.outer[1])
        error, weight, weights = ((guess - t) ** 2).mean(), 1.0, 1.0
        for level in (4, 2, 1):
            if level < min(t.shape[2:]):
                weight = weight / 2
                weights = weights + weight
                error = error + weight * ((window_means(guess, level) - window_means(t, level)) ** 2).mean()
        total = total + error / weights
    return total


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_is_the_formula(size, pairs):
    loss, *given = review(pairs, size)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("name", ["three stages", "other sizes", "not square", "one"])
def test_is_the_formula_on_two_samples(name):
    loss, *given = review(PAIRS[name], 2)
    assert_agrees(loss, formula, *given)


def test_gradient():
    loss, student, teacher, batch = review([((2, 3, 3), (3, 3, 3)), ((2, 2, 2), (2, 2, 2))], 3, width=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    features = tuple(f.double().requires_grad_() for f in student.features.values())
    value = lambda *f: loss(kdkit.Outputs(student.logits, dict(zip(student.features, f, strict=True))), teacher, batch)  # noqa: E731
    assert torch.autograd.gradcheck(value, features)


def test_deeper_layers_teach_shallower_ones_and_not_the_reverse():
    loss, student, teacher, batch = review(PAIRS["three stages"])
    features = {name: f.requires_grad_() for name, f in student.features.items()}
    aim = kdkit.Outputs(teacher.logits, {**teacher.features, "t0": teacher.features["t0"].flip(0)})
    gap = loss(student, aim, batch) - loss(student, teacher, batch)  # what only the shallowest target changes
    slopes = torch.autograd.grad(gap, list(features.values()))
    assert all(slope.abs().max() > 1e-6 for slope in slopes)
    aim = kdkit.Outputs(teacher.logits, {**teacher.features, "t2": teacher.features["t2"].flip(0)})
    shallow, _, deep = torch.autograd.grad(loss(student, aim, batch) - loss(student, teacher, batch), list(features.values()))
    assert shallow.abs().max() < 1e-6 < deep.abs().max()


@pytest.mark.parametrize("check", [check_adapters_learn, check_teaches_the_student])
def test_keeps_its_promises_with_one_layer(check):
    check(Review, width=3)


@pytest.mark.parametrize("pair", [((3, 4, 4), (5,)), ((15, 3), (15, 5)), ((), ())])
def test_refuses_what_is_no_map(pair):
    with pytest.raises(kdkit.ShapeError, match=r"student 's1' .*teacher 't1' .*must be two maps .* or two vectors"):
        review([((3, 8, 8), (5, 8, 8)), pair])
