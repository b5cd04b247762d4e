import math

import pytest
import torch
from pydantic import ValidationError

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

KDSVD = registry.load().losses["kdsvd"]
PAIRS = [{"student": "a", "teacher": "c"}, {"student": "b", "teacher": "d"}]

# Shapes of two layers of the student, then of the teacher.
SHAPES = {
    "same": ((4, 3, 3), (5, 2, 3), (4, 3, 3), (5, 2, 3)),
    "more channels than positions": ((9, 2, 2), (8, 2, 2), (9, 2, 2), (8, 2, 2)),
    "other sizes": ((4, 5, 5), (6, 2, 2), (4, 3, 3), (6, 3, 4)),
    "other channels": ((3, 3, 3), (5, 3, 3), (6, 3, 3), (4, 3, 3)),
    "tokens": ((10, 4), (9, 5), (9, 4), (16, 5)),
    "one pixel": ((4, 3, 3), (5, 1, 1), (4, 3, 3), (5, 1, 1)),
}


def answers(shapes, size):
    a, b, c, d = shapes
    return random_outputs({"a": a, "b": b}, size=size), random_outputs({"c": c, "d": d}, size=size, seed=1), random_batch(size)


def kdsvd(student, teacher, layers=PAIRS, **options):
    loss = KDSVD(KDSVD.Options(layers=layers, **options))
    loss.setup(student, teacher)
    return loss


def formula(loss, student, teacher, batch):
    """One image, one vector and one pair of layers at a time, by torch's own decomposition."""
    adapted = []
    for pair, adapter in zip(loss.options.layers, loss.adapters, strict=True):
        f_s, f_t = kdkit.as_map(student.features[pair.student]), kdkit.as_map(teacher.features[pair.teacher])
        if isinstance(adapter, torch.nn.Conv2d):
            f_s = torch.einsum("bchw,dc->bdhw", f_s, adapter.weight[:, :, 0, 0]) + adapter.bias[:, None, None]
        adapted.append((f_s, f_t))
    k = min([loss.options.k] + [side for pair in adapted for f in pair for side in (f.shape[1], f.shape[2] * f.shape[3])])
    total = 0
    for n in range(len(batch.classes)):
        before = None
        for f_s, f_t in adapted:
            _, strengths, v_s = torch.linalg.svd(f_s[n].flatten(1).T, full_matrices=False)
            v_s = v_s[: k + 3][strengths[: k + 3] > 1e-9]  # the others are any that stand on these
            _, values, v_t = torch.linalg.svd(f_t[n].flatten(1).T, full_matrices=False)
            vectors = []
            for j in range(k):
                target = v_t[j] if v_t[j].sum() >= 0 else -v_t[j]
                cosines = [(v @ target).item() for v in v_s]
                best = max(range(len(v_s)), key=lambda i: abs(cosines[i]))  # noqa: B023
                guess = v_s[best] if cosines[best] >= 0 else -v_s[best]
                weight = values[j] / (values[:k] ** 2).sum().sqrt()
                vectors.append((weight * guess, weight * target))
            for (now_s, now_t), (then_s, then_t) in zip(vectors, before or [], strict=bool(before)):
                k_s, k_t = (torch.exp(-((now[:, None] - then) ** 2) / 8) for now, then in ((now_s, then_s), (now_t, then_t)))
                total = total + ((k_s - k_t) ** 2).sum()
            before = vectors
    return total / len(batch.classes) / (len(adapted) - 1)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, k, shapes):
    student, teacher, batch = answers(shapes, size)
    assert_agrees(kdsvd(student, teacher, k=k), formula, student, teacher, batch)


@pytest.mark.parametrize("k", [1, 4])
def test_is_the_formula_on_a_usual_batch(k):
    student, teacher, batch = answers(SHAPES["other sizes"], 64)
    assert_agrees(kdsvd(student, teacher, k=k), formula, student, teacher, batch)


def test_directions_by_hand():
    """Two channels and all positions along one direction: the teacher's is that of the first channel in both layers, the student's is
    that in the first layer and (0.6, -0.8) in the second."""

    def maps(*direction):
        return torch.tensor(direction).reshape(1, 2, 1, 1) * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)

    student = kdkit.Outputs(torch.zeros(1, 2), {"a": maps(1.0, 0.0), "b": maps(-6.0, 8.0)})
    teacher = kdkit.Outputs(torch.zeros(1, 2), {"c": maps(-2.0, 0.0), "d": maps(1.0, 0.0)})
    value = kdsvd(student, teacher)(student, teacher, random_batch(1))
    kernels = [math.exp(-(x**2) / 8) for x in (0.6 - 1, 0.6, -0.8 - 1, -0.8)], [math.exp(-(x**2) / 8) for x in (1 - 1, 1, -1, 0)]
    assert value.item() == pytest.approx(sum((s - t) ** 2 for s, t in zip(*kernels, strict=True)))


@pytest.mark.parametrize("scale", [-3.0, 1.0, 100.0])
def test_neither_scale_nor_sign_nor_the_positions_order_matter(scale):
    student, teacher, batch = answers(SHAPES["same"], 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    a = scale * student.features["a"].flatten(2)[:, :, order].reshape(3, 4, 3, 3)
    moved = kdkit.Outputs(student.logits, {"a": a, "b": student.features["b"]})
    torch.testing.assert_close(kdsvd(student, teacher)(moved, teacher, batch), kdsvd(student, teacher)(student, teacher, batch))


def test_alike_is_nothing():
    student, _, batch = answers(SHAPES["same"], 3)
    teacher = kdkit.Outputs(student.logits, {"c": student.features["a"], "d": -2 * student.features["b"]})
    assert kdsvd(student, teacher, k=2)(student, teacher, batch).item() == pytest.approx(0, abs=1e-10)


def test_three_layers_are_the_mean_of_the_two_steps():
    student = random_outputs({"a": (4, 3, 3), "b": (5, 3, 3), "e": (3, 2, 2)})
    teacher = random_outputs({"c": (4, 3, 3), "d": (5, 3, 3), "f": (3, 2, 2)}, seed=1)
    layers = [*PAIRS, {"student": "e", "teacher": "f"}]
    all_three, *steps = (kdsvd(student, teacher, chosen)(student, teacher, random_batch()) for chosen in (layers, layers[:2], layers[1:]))
    torch.testing.assert_close(all_three, sum(steps) / 2)


@pytest.mark.parametrize("name", ["same", "more channels than positions", "other channels"])
@pytest.mark.parametrize("k", [1, 2])
def test_gradient(name, k):
    student, teacher, batch = answers(SHAPES[name], 2)
    loss, teacher = kdsvd(student, teacher, k=k).double(), teacher.map(torch.Tensor.double)
    a, b = (student.features[key].double().requires_grad_() for key in "ab")
    assert torch.autograd.gradcheck(lambda a, b: loss(kdkit.Outputs(student.logits, {"a": a, "b": b}), teacher, batch), (a, b))


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0, 1.0), (2.0, 2.0 + 1e-7, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0), (1e-9, 1e-9, 0.0, 0.0)])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("k", [1, 3])
def test_equal_and_vanishing_singular_values_have_bounded_slopes(k, channels, values):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, 4, generator=generator))[0] for n in (9, channels))
    f = (v * torch.tensor(values) @ u.mT).unflatten(2, (3, 3)).requires_grad_()
    _, teacher, batch = answers(((1, 1, 1), (1, 1, 1), (channels, 3, 3), (channels, 3, 3)), 3)
    student = kdkit.Outputs(teacher.logits, {"a": f, "b": f.flip(0)})
    value = kdsvd(student, teacher, k=k)(student, teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_equal_values_beside_the_chosen_vector_leave_its_slope_exact():
    """The first singular value stands alone; how the equal ones after it turn into each other does not matter to it."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64, generator=generator))[0] for n in (9, 4))
    f = (v * torch.tensor([3.0, 1.0, 1.0, 1.0]) @ u.mT).reshape(1, 4, 3, 3)
    g = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=generator)
    teacher = kdkit.Outputs(torch.zeros(1, 2), {"c": f + 0.1 * g, "d": g})
    student = kdkit.Outputs(torch.zeros(1, 2), {"a": f, "b": g})
    loss = kdsvd(student, teacher)
    assert torch.autograd.gradcheck(
        lambda f: loss(kdkit.Outputs(student.logits, {"a": f, "b": g}), teacher, random_batch(1)), f.requires_grad_()
    )


def test_keeps_the_promises_with_more_vectors():
    check_loss(KDSVD, layers=[{"student": "a", "teacher": "a"}, {"student": "b", "teacher": "b"}], k=4)


def test_needs_two_layers():
    with pytest.raises(ValidationError, match="at least 2 items"):
        KDSVD.Options(layers=PAIRS[:1])


def test_refuses_what_has_no_positions():
    student, teacher = random_outputs({"a": (3,), "b": (3,)}), random_outputs({"c": (3,), "d": (3,)})
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3\) and teacher 'c' \(6, 3\) must be maps"):
        kdsvd(student, teacher)
