import math

import pytest
import torch
import torch.nn.functional as F
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

WKD = registry.load().losses["wkd_feature"]
PAIR = [{"student": "a", "teacher": "b"}]


def wkd(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = WKD(WKD.Options(layers=PAIR, **options))
    s, t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    if x.numel() == x.shape[1]:  # the running ones
        mean, variance = torch.zeros_like(x), torch.ones_like(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def squared_distance(s, t, ratio):
    """Of two channels in one cell."""
    (m_s, d_s), (m_t, d_t) = (
        (x.sum() / x.numel(), (((x - x.sum() / x.numel()) ** 2).sum() / max(x.numel() - 1, 1) + 1e-5).sqrt()) for x in (s, t)
    )
    return ratio * (m_s - m_t) ** 2 + (d_s - d_t) ** 2


def window(f, grid, i, j):
    h, w = f.shape[-2:]
    return f[..., math.floor(i * h / grid) : math.ceil((i + 1) * h / grid), math.floor(j * w / grid) : math.ceil((j + 1) * w / grid)]


def formula(loss, student, teacher, batch):
    """One sample, one cell and one channel at a time."""
    o, f_s, f_t, total = loss.options, student.features["a"], teacher.features["b"], 0
    f_s = kdkit.as_map(f_s)
    for i in range(0, len(loss.projectors[0]), 3):
        conv, norm = loss.projectors[0][i], loss.projectors[0][i + 1]
        f_s = normalised(F.conv2d(f_s, conv.weight, padding=conv.kernel_size[0] // 2), norm).clamp_min(0)
    for s, t in zip(f_s, f_t, strict=True):
        for i in range(o.grid):
            for j in range(o.grid):
                total = total + sum(
                    squared_distance(a, b, o.mean_ratio) for a, b in zip(window(s, o.grid, i, j), window(t, o.grid, i, j), strict=True)
                )
    return total / (len(f_s) * o.grid**2)


SHAPES = [((3, 4, 4), (5, 4, 4)), ((3, 7, 5), (2, 3, 6)), ((3, 1, 1), (2, 1, 1)), ((17, 3), (2, 4, 4))]


# not two samples of one pixel: normalised to +-1, they have a gradient that fp32 cannot hold
SIZES = [(shapes, size) for shapes in SHAPES for size in (1, 2, 8) if (shapes, size) != (SHAPES[2], 2)]


@pytest.mark.parametrize(("shapes", "size"), SIZES)
@pytest.mark.parametrize("options", [{}, {"grid": 2, "mean_ratio": 4.0}, {"grid": 3, "bottleneck": 4}])
def test_is_the_formula(options, shapes, size):
    loss, *given = wkd(*shapes, size=size, **options)
    assert_agrees(loss, formula, *given)


def by_hand(s, t, **options):
    """The value for maps whose student's needs no projection."""
    loss, *_ = wkd(tuple(s.shape[1:]), tuple(t.shape[1:]), size=len(s), **options)
    loss.projectors[0] = torch.nn.Identity()
    logits = torch.zeros(len(s), 2)
    return loss(kdkit.Outputs(logits, {"a": s}), kdkit.Outputs(logits, {"b": t}), random_batch(len(s))).item()


def test_two_pixels_by_hand():
    """Means 2 and 3, deviations sqrt(2) and 0, but for the eps."""
    s, t = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), torch.tensor([3.0, 3.0]).view(1, 1, 1, 2)
    deviations = (2 + 1e-5) ** 0.5 - 1e-5**0.5
    assert by_hand(s, t) == pytest.approx(2 * 1 + deviations**2)
    # in cells of one pixel there is no deviation
    assert by_hand(s, t, grid=2) == pytest.approx(2 * (4 + 0) / 2)


def test_channels_count_as_a_sum_and_samples_and_cells_as_a_mean():
    f = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    one = by_hand(f, f + 1)
    assert one == pytest.approx(2 * 3, rel=1e-5)
    assert by_hand(torch.cat([f, f], 1), torch.cat([f, f], 1) + 1) == pytest.approx(2 * one, rel=1e-5)
    assert by_hand(torch.cat([f, f]), torch.cat([f, f]) + 1, grid=4) == pytest.approx(one, rel=1e-5)


def test_a_constant_cell_far_from_zero_has_no_deviation():
    """Of a mean square less a squared mean, rounding would be left."""
    s = torch.full((1, 1, 4, 4), 1e4)
    s[..., 2:, :] = -1e4
    assert by_hand(s, s + 1, grid=2) == pytest.approx(2 * 1, rel=1e-6)


def test_keeps_the_promises_with_options():
    check_but(WKD, grid=2)
    # of equal rows, each of three batch norms enlarges the gradient by 1 / sqrt(1e-5)
    check_but(WKD, "check_survives_degenerate_inputs", bottleneck=4, grid=3)


def test_equal_rows_in_a_bottleneck_have_a_finite_gradient():
    loss, student, teacher, batch = wkd((3, 4, 4), (5, 4, 4), bottleneck=4)
    f = torch.ones_like(student.features["a"]).requires_grad_()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (5, 4, 4))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        wkd(student, teacher)
