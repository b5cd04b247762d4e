import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

ChannelGap = registry.load().losses["channel_gap"]
PAIR = [{"student": "a", "teacher": "b"}]


def channel_gap(student, teacher, size=4, layers=PAIR):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = ChannelGap(ChannelGap.Options(layers=layers))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def means(f):
    """Of a map's channels, or a sequence's, one at a time."""
    if f.ndim == 2:
        return f
    f = f.transpose(1, 2) if f.ndim == 3 else f.flatten(2)
    return torch.stack([torch.stack([channel.sum() / len(channel) for channel in sample]) for sample in f])


def formula(loss, student, teacher, batch):
    adapter, v_s, v_t = loss.adapters[0], means(student.features["a"]), means(teacher.features["b"])
    if isinstance(adapter, torch.nn.Linear):
        v_s = torch.stack([adapter.weight @ v + adapter.bias for v in v_s])
    return sum((a - b) ** 2 for s, t in zip(v_s, v_t, strict=True) for a, b in zip(s, t, strict=True)) / v_t.numel()


SHAPES = [
    ((3, 4, 4), (3, 4, 4)),
    ((3, 4, 4), (5, 4, 4)),
    ((3, 8, 6), (5, 4, 3)),
    ((9, 3), (5, 2, 2)),
    ((9, 3), (7, 5)),
    ((3,), (5,)),
    ((5, 2, 2), (5,)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes):
    loss, *answers = channel_gap(*shapes, size=size)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = channel_gap(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


def test_an_adapter_only_where_widths_differ():
    assert not list(channel_gap((3, 4, 4), (3, 8, 8))[0].parameters())
    assert [tuple(p.shape) for p in channel_gap((3, 4, 4), (5, 4, 4))[0].parameters()] == [(5, 3), (5,)]


def test_the_adapter_is_a_1x1_convolution_of_the_map():
    loss, student, teacher, batch = channel_gap((3, 4, 4), (5, 4, 4))
    linear = loss.adapters[0]
    maps = torch.nn.functional.conv2d(student.features["a"], linear.weight[:, :, None, None], linear.bias)
    plain, *_ = channel_gap((5, 4, 4), (5, 4, 4))
    torch.testing.assert_close(loss(student, teacher, batch), plain(kdkit.Outputs(student.logits, {"a": maps}), teacher, batch))


def test_where_in_the_map_does_not_matter():
    loss, student, teacher, batch = channel_gap((3, 4, 4), (3, 4, 4))
    rolled = kdkit.Outputs(student.logits, {"a": student.features["a"].roll((1, 2), (2, 3))})
    torch.testing.assert_close(loss(rolled, teacher, batch), loss(student, teacher, batch))
    alike = kdkit.Outputs(teacher.logits, {"b": rolled.features["a"]})
    assert loss(student, alike, batch).item() == pytest.approx(0, abs=1e-12)


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (3, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    values = []
    for chosen in (layers, layers[:1], layers[1:]):
        loss = ChannelGap(ChannelGap.Options(layers=chosen))
        loss.setup(student, teacher)
        values.append(loss(student, teacher, random_batch()))
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)


@pytest.mark.parametrize("shapes", SHAPES[1:5])
def test_gradient(shapes):
    loss, student, teacher, batch = channel_gap(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_refuses_what_has_no_channels():
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(4,\) and teacher 'b' \(4, 5\) must be vectors"):
        channel_gap((), (5,))
