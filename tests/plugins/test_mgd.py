import pytest
import torch
import torch.nn.functional as F
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

MGD = registry.load().losses["mgd"]
PAIR = [{"student": "a", "teacher": "b"}]


def mgd(student, teacher, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = MGD(MGD.Options(layers=PAIR, **options))
    s, t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def formula(loss, student, teacher, batch):
    f, target = student.features["a"], teacher.features["b"]
    align, (first, _, second) = loss.aligns[0], loss.generators[0]
    if f.shape[1] != target.shape[1]:
        f = torch.einsum("bchw,dc->bdhw", f, align.weight[:, :, 0, 0]) + align.bias[:, None, None]
    if f.shape[2:] != target.shape[2:]:
        f = F.interpolate(f, size=target.shape[2:], mode="bilinear", align_corners=False)
    torch.manual_seed(7)
    draws = torch.rand((len(f), 1, *f.shape[2:]) if loss.options.mask == "positions" else (*f.shape[:2], 1, 1))
    total = 0
    for i, (x, t) in enumerate(zip(f, target, strict=True)):
        x = torch.where(draws[i] < loss.options.ratio, 0.0, 1.0) * x
        x = F.conv2d(x[None], first.weight, first.bias, padding=1).clamp_min(0)
        total = total + ((F.conv2d(x, second.weight, second.bias, padding=1)[0] - t) ** 2).sum()
    return total / len(f)


class Seeded(MGD):
    """Draws the mask that the formula draws."""

    def forward(self, student, teacher, batch):
        torch.manual_seed(7)
        return super().forward(student, teacher, batch)


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 2), (5, 4, 4)), ((4, 3, 5), (2, 4, 6))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("mask", ["positions", "channels"])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, mask, shapes):
    loss, *given = mgd(*shapes, size=size, mask=mask)
    loss.__class__ = Seeded
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = mgd(*shapes, size=2)
    loss.__class__ = Seeded
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def shown(mask, ratio, size=8, shape=(6, 16, 16)):
    """Where what the generator gets is not hidden, (B, C, H, W)."""
    loss, student, teacher, batch = mgd(shape, shape, size=size, mask=mask, ratio=ratio)
    seen = []
    loss.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss(student, teacher, batch)
    assert torch.equal(seen[0][seen[0] != 0], student.features["a"][seen[0] != 0])
    return seen[0] != 0


def test_whole_positions_or_whole_channels_are_hidden():
    positions, channels = shown("positions", 0.3), shown("channels", 0.3)
    assert torch.equal(positions, positions[:, :1].expand_as(positions)) and not torch.equal(positions[0], positions[1])
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels)) and not torch.equal(channels[0], channels[1])
    assert positions.float().mean().item() == pytest.approx(0.7, abs=0.03)


def test_nothing_is_hidden_at_ratio_zero():
    assert shown("positions", 0.0).all()


def test_keeps_the_promises_with_channels():
    check_but(MGD, "check_teaches_every_part", mask="channels")  # a hidden channel teaches nothing


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (5, 4, 4))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        mgd(student, teacher)
