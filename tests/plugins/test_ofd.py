import math

import pytest
import timm
import torch
from naive_maps import convolved, normalised, resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

OFD = registry.load().losses["ofd"]
PAIR = [{"student": "a", "teacher": "b"}]


def teacher_with(bias, scale):
    """A network whose layer `b` is a batch norm."""
    norm = torch.nn.BatchNorm2d(len(bias))
    norm.load_state_dict({**norm.state_dict(), "weight": torch.tensor(scale), "bias": torch.tensor(bias)})
    return torch.nn.ModuleDict({"b": norm}).requires_grad_(False)


def context(teacher):
    return kdkit.Context(torch.nn.Identity(), teacher, 5, 64, torch.arange(64) % 5)


def ofd(student, teacher, size=4, bias=None, scale=None, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = OFD(OFD.Options(layers=PAIR, **options))
    channels = teacher[0]
    network = teacher_with(bias or [0.3 * c - 0.5 for c in range(channels)], scale or [0.2 * c - 0.5 for c in range(channels)])
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t, context(network))
    return loss, f_s, f_t, random_batch(size)


def margin(bias, scale):
    """The mean of the negative part of a Gaussian, by summing over a fine grid; the released code's way out where there is next to none."""
    if scale == 0:
        return min(bias, 0)
    scale = abs(scale)
    x = torch.linspace(min(bias, 0) - 12 * scale, min(bias + 12 * scale, 0), 400_001, dtype=torch.float64)
    density = torch.exp(-(((x - bias) / scale) ** 2) / 2)
    if density.sum() * (x[1] - x[0]) / (scale * math.sqrt(2 * math.pi)) <= 0.001:
        return -3 * scale
    return float((x * density).sum() / density.sum())


def formula(loss, student, teacher, batch):
    """The three cases of a value, as the paper writes them."""
    t, (conv, norm) = teacher.features["b"], loss.connectors[0]
    s = resized(normalised(convolved(student.features["a"], conv), norm), t.shape[2:])
    m = loss.margins0.expand_as(t)
    total = ((s - t) ** 2)[t > 0].sum()
    total = total + ((s - t) ** 2)[(t <= 0) & (t > m) & (s > t)].sum()
    return (total + ((s - m) ** 2)[(t <= m) & (s > m)].sum()) / len(s)


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (2, 7, 6))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes):
    loss, *answers = ofd(*shapes, size=size)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = ofd(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


CASES = {
    "usual": (0.2, 0.7),
    "negative scale": (0.2, -0.7),
    "no bias": (0.0, 1.0),
    "mostly negative": (-3.0, 0.5),
    "almost always positive": (3.05, 1.0),
    "always positive": (4.0, 1.0),
    "far beyond": (1e4, 1e-3),
    "far below": (-1e4, 1e-3),
    "no scale, below": (-0.5, 0.0),
    "no scale, above": (0.5, 0.0),
    "nothing at all": (0.0, 0.0),
}


@pytest.mark.parametrize(("bias", "scale"), CASES.values(), ids=CASES)
def test_the_margin_is_the_mean_of_the_negative_part(bias, scale):
    loss, *_ = ofd((3, 4, 4), (1, 4, 4), bias=[bias], scale=[scale])
    assert loss.margins0.shape == (1, 1, 1)
    assert loss.margins0.item() == pytest.approx(margin(bias, scale), rel=1e-4, abs=1e-6)


def test_a_batch_norm_without_scale_has_scale_one():
    loss, network = OFD(OFD.Options(layers=PAIR)), torch.nn.ModuleDict({"b": torch.nn.BatchNorm2d(3, affine=False)})
    loss.setup(random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (3, 4, 4)}), context(network))
    torch.testing.assert_close(loss.margins0.flatten(), torch.full((3,), -math.sqrt(2 / math.pi)))


def test_margins_are_saved_and_do_not_learn():
    loss, *_ = ofd((3, 4, 4), (5, 4, 4))
    assert "margins0" in loss.state_dict() and "margins0" not in dict(loss.named_parameters())


def test_real_networks_before_their_activations():
    """The last batch norm before the activation is found by itself; another may be named."""
    student = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[4, 4, 8, 8])
    teacher = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[4, 8, 8, 8]).eval().requires_grad_(False)
    torch.nn.init.normal_(teacher.layer2[0].bn2.weight)
    name = "layer2.0.act2@input"
    images = torch.rand(3, 3, 64, 64)
    f_s, f_t = kdkit.taps(student, [name])(images), kdkit.taps(teacher, [name])(images)
    assert (f_t.features[name] < 0).any()
    found = []
    for norms in (None, ["layer2.0.bn2"], ["layer2.0.bn1"]):
        loss = OFD(OFD.Options(layers=[{"student": name, "teacher": name}], norms=norms))
        loss.setup(f_s, f_t, context(teacher))
        loss(f_s, f_t, random_batch(3)).backward(retain_graph=True)
        found.append(loss.margins0)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert student.conv1.weight.grad.any()


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    network = torch.nn.ModuleDict({"b": torch.nn.BatchNorm2d(5), "d": torch.nn.BatchNorm2d(2)})
    both, alone = OFD(OFD.Options(layers=layers)), []
    both.setup(student, teacher, context(network))
    for i, layer in enumerate(layers):
        one = OFD(OFD.Options(layers=[layer]))
        one.setup(student, teacher, context(network))
        one.connectors[0].load_state_dict(both.connectors[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = ofd(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


@pytest.mark.parametrize("given", [None, context(None)], ids=["no context", "no teacher"])
def test_refuses_to_guess_margins(given):
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3, 4, 4\) and teacher 'b' \(6, 5, 4, 4\) need margins"):
        OFD(OFD.Options(layers=PAIR)).setup(random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}), given)


def test_refuses_the_wrong_batch_norms():
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'b' \(4, 3, 4, 4\): the batch norm of 'b' has 2 channels"):
        ofd((3, 4, 4), (3, 4, 4), bias=[0.0, 0.0], scale=[1.0, 1.0])
    with pytest.raises(kdkit.ShapeError, match="`norms` names 2 batch norms for 1 layer pairs"):
        ofd((3, 4, 4), (3, 4, 4), norms=["b", "b"])
    with pytest.raises(kdkit.TapError):
        ofd((3, 4, 4), (3, 4, 4), norms=["c"])


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        ofd(student, teacher)
