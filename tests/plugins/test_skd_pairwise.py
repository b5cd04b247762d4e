import pytest
import torch
from naive_pixels import LARGER, OTHER, SAME, SMALLER, at_one_size, set_up, unit

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees

SKD = registry.load().losses["skd_pairwise"]


def formula(loss, student, teacher, batch):
    """Region by region, pair by pair."""
    matrices = []
    for f in at_one_size(student, teacher):
        k, (height, width) = loss.options.pool, f.shape[2:]
        regions = [
            [unit(image[:, top : top + k, left : left + k].amax((1, 2))) for top in range(0, height, k) for left in range(0, width, k)]
            for image in f
        ]
        matrices.append([(one * other).sum() for image in regions for one in image for other in image])
    return torch.stack([(s - t) ** 2 for s, t in zip(*matrices, strict=True)]).mean()


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("shapes", [SAME, OTHER, SMALLER, LARGER], ids=str)
def test_is_the_formula(shapes, pool):
    loss, *answers = set_up(SKD, shapes, pool=pool)
    assert_agrees(loss, formula, *answers)


def test_neither_length_nor_turning_of_features_matters():
    """Similarities see only angles."""
    loss, student, teacher, batch = set_up(SKD, SAME, pool=1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    turned = torch.einsum("dc,bchw->bdhw", turn, 7 * teacher.features["b"])
    value = loss(kdkit.Outputs(student.logits, {"a": turned}), teacher, batch)
    assert value.item() == pytest.approx(0, abs=1e-10) and loss(student, teacher, batch) > 0.1


def test_dead_pixels_have_a_bounded_gradient():
    loss, student, teacher, batch = set_up(SKD, SAME, pool=1)
    f = torch.zeros_like(student.features["a"]).requires_grad_()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e3


@pytest.mark.parametrize(
    ("shapes", "pool", "says"),
    [
        (((3, 4, 4), (5, 1, 1)), 1, r"teacher 'b' \(2, 5, 1, 1\) has one position, .*student 'a' \(2, 3, 4, 4\).*before the pooling$"),
        (OTHER, 6, r"\(2, 5, 4, 6\) has one position with `pool: 6`.*smaller `pool`"),
        (((3,), (5, 4, 4)), 2, "must be maps"),
    ],
)
def test_refuses_what_has_no_pairs(shapes, pool, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        set_up(SKD, shapes, pool=pool)
