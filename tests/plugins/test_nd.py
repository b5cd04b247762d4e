import functools

import pytest
import torch
import torch.nn.functional as F
from promises import check_but
from torch import nn

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.forms import CLASSES
from kdkit.testing.outputs import of_texts

ND = registry.load().losses["nd"]
PAIR = [{"student": "a", "teacher": "b"}]


def survey_of(answers, network, survey):
    """What the survey makes of these answers, instead of those of a network."""
    return survey.of(answers)


def context(answers):
    return kdkit.Context(
        nn.Identity(), nn.Identity(), CLASSES, 64, torch.arange(64) % CLASSES, survey=functools.partial(survey_of, answers)
    )


def taught(shape, size=20):
    """Two batches of a teacher's answers, and their labels."""
    return [(random_outputs({"b": shape, "d": shape}, size=size, seed=seed), random_batch(size)) for seed in (5, 6)]


def nd(student, teacher, size=4, layers=PAIR, seen=None, **options):
    """The loss, set up, and what it compares; shapes without the batch."""
    torch.manual_seed(0)
    loss = ND(ND.Options(layers=layers, **options))
    s, t = random_outputs({"a": student, "c": student}, size=size), random_outputs({"b": teacher, "d": teacher}, size=size, seed=1)
    loss.setup(s, t, context(taught(teacher) if seen is None else seen))
    return loss, s, t, random_batch(size)


def pooled(f):
    """The vector of one sample."""
    return f if f.ndim == 1 else f.mean(0) if f.ndim == 2 else f.mean((1, 2))


def mean_direction(shape, layer, y):
    """The mean of the teacher's vectors of a class, with norm 1."""
    found = [
        pooled(f).double()
        for outputs, batch in taught(shape)
        for f, label in zip(outputs.features[layer], batch.labels, strict=True)
        if label == y
    ]
    mean = sum(found) / len(found)
    return mean / (mean**2).sum().sqrt()


def formula(shape, loss, student, teacher, batch):
    """One sample at a time."""
    total = 0
    for part, pair in zip(loss.parts, loss.options.layers, strict=True):
        for f_s, f_t, y in zip(student.features[pair.student], teacher.features[pair.teacher], batch.labels, strict=True):
            e, f_t = pooled(f_s), pooled(f_t)
            if len(part.adapter._modules):
                linear, norm = part.adapter[4], part.adapter[1]
                # in eval mode, with the statistics that it begins with
                e = linear.weight @ (e / (1 + norm.eps) ** 0.5 * norm.weight + norm.bias) + linear.bias
            dot = sum(a * b for a, b in zip(e, mean_direction(shape, pair.teacher, y).to(e), strict=True))
            total = total + 1 - dot / max((e**2).sum().sqrt(), (f_t**2).sum().sqrt())
    return total / len(batch.labels) / len(loss.parts)


@pytest.mark.parametrize("layers", [PAIR, [*PAIR, {"student": "c", "teacher": "d"}]], ids=["one pair", "two pairs"])
@pytest.mark.parametrize(
    "shapes", [((3,), (3,)), ((3,), (5,)), ((3, 4, 4), (3, 2, 2)), ((7, 3), (9, 5))], ids=["vectors", "adapter", "maps", "tokens"]
)
def test_is_the_formula(shapes, layers):
    loss, *given = nd(*shapes, layers=layers)
    assert_agrees(loss.eval(), functools.partial(formula, shapes[1]), *given)


def one_class(direction):
    """A teacher whose embeddings of class 0 all point in one direction."""
    return [(kdkit.Outputs(torch.zeros(1, CLASSES), {"b": torch.tensor([direction]), "d": torch.tensor([direction])}), random_batch(1))]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([3.0, 4.0], [0.0, 5.0], 1 - 4 / 5),
        ([0.0, 2.0], [0.0, 5.0], 1 - 2 / 5),  # short: to be made longer
        ([0.0, 9.0], [0.0, 5.0], 0.0),  # long: right as it is
        ([0.0, -9.0], [0.0, 5.0], 2.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
    ],
)
def test_length_and_direction(student, teacher, expected):
    loss, *_ = nd((2,), (2,), seen=one_class([0.0, 7.0]))
    s, t = (kdkit.Outputs(torch.zeros(1, CLASSES), {name: torch.tensor([f])}) for name, f in (("a", student), ("b", teacher)))
    assert loss(s, t, random_batch(1)).item() == pytest.approx(expected)


def test_the_length_has_a_gradient_below_the_teachers_only():
    loss, *_ = nd((2,), (2,), seen=one_class([0.0, 7.0]))
    t = kdkit.Outputs(torch.zeros(1, CLASSES), {"b": torch.tensor([[0.0, 5.0]])})
    slopes = []
    for length in (2.0, 9.0):
        f = torch.tensor([[0.0, length]], requires_grad=True)
        loss(kdkit.Outputs(torch.zeros(1, CLASSES), {"a": f}), t, random_batch(1)).backward()
        slopes.append(f.grad[0, 1].item())
    assert slopes == pytest.approx([-1 / 5, 0.0])


def test_a_class_without_images_has_no_direction():
    loss, student, teacher, batch = nd((3,), (3,), seen=one_class([1.0, 2.0, 2.0]))
    others = kdkit.Batch(batch.inputs, torch.full((4,), 3), batch.index)
    assert loss(student, teacher, others).item() == 1.0


def test_a_mixed_label_is_the_mean_by_shares():
    loss, student, teacher, batch = nd((3,), (3,))
    other = (batch.labels + 1) % CLASSES
    shares = 0.7 * F.one_hot(batch.labels, CLASSES) + 0.3 * F.one_hot(other, CLASSES)
    value = loss(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))
    parts = [loss(student, teacher, kdkit.Batch(batch.inputs, labels, batch.index)) for labels in (batch.labels, other)]
    torch.testing.assert_close(value, 0.7 * parts[0] + 0.3 * parts[1])


def test_padding_of_texts_is_no_part_of_a_mean():
    batches = [(of_texts(outputs, 5), batch) for outputs, batch in taught((5, 3), size=6)]
    loss, *_ = nd((3,), (3,), seen=batches)
    total = torch.zeros(3)
    for outputs, batch in batches:
        for f, real, y in zip(outputs.features["b"], outputs.mask, batch.labels, strict=True):
            total += f[real].mean(0) if y == 1 else 0
    torch.testing.assert_close(loss.parts[0].directions[1], total / total.norm())


def test_the_directions_are_not_saved():
    """They are the teacher's, who may be another one in the next stage."""
    assert not nd((3,), (3,))[0].state_dict()


def test_refuses_a_context_without_images():
    with pytest.raises(kdkit.ShapeError, match=r"give setup a kdkit\.Context with the teacher network and a `survey`"):
        ND(ND.Options(layers=PAIR)).setup(random_outputs({"a": (3,)}), random_outputs({"b": (3,)}))
    bare = kdkit.Context(nn.Identity(), nn.Identity(), CLASSES, 64, torch.arange(64))
    with pytest.raises(kdkit.TapError, match="the context has no `survey`"):
        ND(ND.Options(layers=PAIR)).setup(random_outputs({"a": (3,)}), random_outputs({"b": (3,)}), bare)


def test_keeps_the_promises_with_options():
    check_but(ND, dropout=0.2)
