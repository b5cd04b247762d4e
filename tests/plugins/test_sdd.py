import math

import pytest
import torch
from promises import check_but
from pydantic import ValidationError

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.forms import CLASSES, Network

LOSSES = registry.load().losses
SDD = LOSSES["sdd"]
PAIR = [{"student": "a", "teacher": "b"}]


def sdd(student, teacher, size=4, layers=PAIR, classes=CLASSES, **options):
    """The loss, set up with networks whose logits are their classifiers' of the layers, and what it compares."""
    torch.manual_seed(0)
    networks = Network({"a": student}, classes), Network({"b": teacher}, classes)
    s, t = (
        random_outputs({name: shape}, size=size, classes=classes, seed=n)
        for n, (name, shape) in enumerate([("a", student), ("b", teacher)])
    )
    s, t = networks[0].answer(s), networks[1].answer(t)
    loss = SDD(SDD.Options(layers=layers, **options))
    loss.setup(s, t, kdkit.Context(*networks, classes, 64, torch.arange(64) % classes))
    return loss, s, t, random_batch(size, classes)


def softmax(z):
    return z.exp() / z.exp().sum()


def kl(q, p):
    return sum(b * (b.log() - a.log()) for a, b in zip(p, q, strict=True))


def inner(z_s, z_t, y, o):
    """Of one row."""
    t, rest = o.temperature, [c for c in range(len(z_s)) if c != y]
    p, q = softmax(z_s / t), softmax(z_t / t)
    if o.inner == "logit_kl":
        return t**2 * kl(q, p)
    p_rest, q_rest = softmax(z_s[rest] / t), softmax(z_t[rest] / t)
    if o.inner == "dkd":
        return t**2 * (o.alpha * kl((q[y], 1 - q[y]), (p[y], 1 - p[y])) + o.beta * kl(q_rest, p_rest))
    return -o.alpha * softmax(z_t)[y] * softmax(z_s)[y].log() - o.beta * t**2 * (q_rest * p_rest.log()).sum()


def window(f, grid, i, j):
    h, w = f.shape[1:]
    part = f[:, math.floor(i * h / grid) : math.ceil((i + 1) * h / grid), math.floor(j * w / grid) : math.ceil((j + 1) * w / grid)]
    return part.flatten(1).sum(1) / part[0].numel()


def formula(loss, student, teacher, batch):
    """One sample and one cell at a time."""
    o, own, theirs, total = loss.options, loss.student_classifier[0].double(), loss.teacher_classifier, 0
    for f_s, f_t, y in zip(student.features["a"], kdkit.as_map(teacher.features["b"]), batch.classes, strict=True):
        whole = (theirs.weight @ window(f_t, 1, 0, 0) + theirs.bias).argmax() == y
        for grid in o.grids:
            for i in range(grid):
                for j in range(grid):
                    z_s = own.weight @ window(f_s, grid, i, j) + own.bias
                    z_t = theirs.weight @ window(f_t, grid, i, j) + theirs.bias
                    weight = 1 if (z_t.argmax() == y) == whole else 2
                    total = total + weight * inner(z_s, z_t, y, o)
    return total / (len(batch.classes) * sum(grid**2 for grid in o.grids))


SHAPES = [((3, 4, 4), (4, 4, 4)), ((3, 7, 5), (4, 3, 6)), ((3, 2, 2), (16, 4))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grids": (1, 2), "temperature": 2.0},
        {"inner": "dkd", "grids": (1, 3)},
        {"inner": "nkd", "temperature": 1.5, "alpha": 2.0, "beta": 0.5},
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_is_the_formula(size, options, shapes):
    loss, *given = sdd(*shapes, size=size, **options)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize(("inner", "options"), [("logit_kl", {}), ("dkd", {"alpha": 0.5}), ("nkd", {"gamma": 1.5})])
def test_of_the_whole_image_alone_it_is_the_inner_loss(inner, options):
    renamed = {{"gamma": "beta"}.get(name, name): value for name, value in options.items()}
    loss, *given = sdd(*SHAPES[0], size=16, inner=inner, grids=(1,), temperature=3.0, **renamed)
    plain = LOSSES[inner](LOSSES[inner].Options(temperature=3.0, **options))
    torch.testing.assert_close(loss(*given), plain(*given))


def test_cells_on_which_the_teacher_contradicts_itself_count_twice():
    """Two cells of a teacher that is right about the left one and wrong about the whole image."""
    loss, student, teacher, batch = sdd((2, 1, 2), (2, 1, 2), size=1, classes=2, grids=(2,), temperature=1.0)
    with torch.no_grad():
        for part in (loss.student_classifier[0], loss.teacher_classifier):
            part.weight.copy_(torch.eye(2)), part.bias.zero_()
    f_t = torch.tensor([[[[1.0, -3.0]], [[0.0, 0.0]]]])
    s, t = kdkit.Outputs(torch.zeros(1, 2), {"a": torch.zeros(1, 2, 1, 2)}), kdkit.Outputs(torch.tensor([[-1.0, 0.0]]), {"b": f_t})
    left, right = (float(kl(softmax(torch.tensor(z)), torch.tensor([0.5, 0.5]))) for z in ([1.0, 0.0], [-3.0, 0.0]))
    # adaptive pooling of one row to two has it twice
    assert loss(s, t, batch).item() == pytest.approx((2 * left + right) / 2)


def test_the_label_has_no_part_among_the_other_classes():
    loss, student, teacher, batch = sdd(*SHAPES[0], inner="nkd", alpha=0.0, grids=(1,), temperature=1.0)
    with torch.no_grad():
        before = loss(student, teacher, batch)
        batch.labels.zero_()
        changed = loss(student, teacher, batch)
        loss.student_classifier[0].bias[0] += 50
        torch.testing.assert_close(loss(student, teacher, batch), changed)
    assert before != changed


def test_mixed_labels_count_as_their_largest_share():
    loss, student, teacher, batch = sdd(*SHAPES[0], inner="dkd")
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, CLASSES) + 0.08
    assert loss(student, teacher, batch) == loss(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


@pytest.mark.parametrize("inner", ["logit_kl", "dkd", "nkd"])
def test_logits_of_ten_thousand(inner):
    loss, student, teacher, batch = sdd(*SHAPES[0], inner=inner)
    student, teacher = (kdkit.Outputs(1e4 * x.logits, {name: 1e4 * f for name, f in x.features.items()}) for x in (student, teacher))
    f = student.features["a"].requires_grad_()
    value = loss(student, teacher, batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all()


def test_both_classifiers_are_the_networks_own():
    loss, student, teacher, batch = sdd(*SHAPES[0])
    own = loss.student_classifier[0]
    loss(student, teacher, batch).backward()
    assert (
        own.weight.grad.any()
        and not any(p.requires_grad for p in loss.parameters())
        and not [name for name in loss.state_dict() if "student" in name]
    )


@pytest.mark.parametrize("options", [{}, {"inner": "nkd", "temperature": 1.0, "beta": 1.5}])
def test_keeps_the_promises_with_options(options):
    # without a part on the label, `alpha` and `beta` do nothing
    check_but(SDD, *(() if options else ["check_every_option_has_an_effect"]), layers=[{"student": "a", "teacher": "a"}], **options)


@pytest.mark.parametrize("grids", [(), (0,), (1, 17)])
def test_refuses_grids(grids):
    with pytest.raises(ValidationError):
        SDD.Options(layers=PAIR, grids=grids)


def test_refuses_heads_that_it_does_not_know_and_several_pairs():
    s, t = random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}, seed=1)
    with pytest.raises(kdkit.ShapeError, match="needs both networks' classifiers"):
        SDD(SDD.Options(layers=PAIR)).setup(s, t)
    with pytest.raises(kdkit.ShapeError, match="one pair, not 2"):
        sdd((3, 4, 4), (5, 4, 4), layers=PAIR * 2)
    context = kdkit.Context(Network({"a": (3,)}), Network({"b": (5,)}), CLASSES, 64, torch.arange(64) % CLASSES)
    with pytest.raises(kdkit.ShapeError, match="teacher 'b' .*head is more than"):
        SDD(SDD.Options(layers=PAIR)).setup(s, t, context)


def test_refuses_one_class():
    with pytest.raises(kdkit.ShapeError, match="one class leaves none"):
        sdd((3, 4, 4), (5, 4, 4), classes=1)
