import copy

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs
from kdkit.testing.forms import CLASSES, Network

CAT = registry.load().losses["cat_kd"]
PAIR = [{"student": "a", "teacher": "b"}]


def networks(student, teacher):
    return Network({"a": student}), Network({"b": teacher})


def answers(pair, student, teacher, size):
    s, t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    return pair[0].answer(s), pair[1].answer(t)


def cat(student, teacher, size=4, **options):
    """The loss, set up with networks whose logits are their classifiers' of the layers, and what it compares."""
    torch.manual_seed(0)
    pair = networks(student, teacher)
    s, t = answers(pair, student, teacher, size)
    loss = CAT(CAT.Options(**{"layers": PAIR, **options}))
    loss.setup(s, t, kdkit.Context(*pair, CLASSES, 64, torch.arange(64) % CLASSES))
    return loss, s, t, random_batch(size)


def activation(f, weight, r):
    """One class, sample and window at a time."""
    (h, w), maps = f.shape[1:], []
    for row in weight:
        cam = sum(share * channel for share, channel in zip(row, f, strict=True))
        means = [
            cam[i * h // r : -(-(i + 1) * h // r), j * w // r : -(-(j + 1) * w // r)].sum()
            / ((-(-(i + 1) * h // r) - i * h // r) * (-(-(j + 1) * w // r) - j * w // r))
            for i in range(r)
            for j in range(r)
        ]
        flat = torch.stack(means)
        maps.append(flat / (flat**2).sum().sqrt())
    return torch.stack(maps)


def formula(loss, student, teacher, batch):
    own, theirs = loss.student_classifier[0].weight.to(torch.float64), loss.teacher_classifier.weight
    total, count = 0, 0
    for f_s, f_t in zip(student.features["a"], teacher.features["b"], strict=True):
        difference = activation(f_s, own, loss.options.r) - activation(f_t, theirs, loss.options.r)
        total, count = total + (difference**2).sum(), count + difference.numel()
    return total / count


SHAPES = [
    ((3, 4, 4), (3, 4, 4)),
    ((3, 4, 4), (5, 4, 4)),
    ((3, 8, 8), (5, 4, 4)),
    ((3, 5, 7), (5, 4, 6)),
    ((3, 1, 3), (5, 2, 2)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, r, shapes):
    loss, *given = cat(*shapes, size=size, r=r)
    assert_agrees(loss, formula, *given)


def test_is_the_formula_on_a_usual_batch():
    loss, *given = cat((3, 4, 4), (5, 4, 4), size=64)
    assert_agrees(loss, formula, *given)


def test_the_gradient_reaches_the_student_s_own_classifier_and_not_the_teacher_s():
    loss, student, teacher, batch = cat((3, 4, 4), (5, 4, 4))
    (own,) = loss.student_classifier
    loss(student, teacher, batch).backward()
    naive = copy.deepcopy(loss).double()
    naive.student_classifier[0].double()
    naive.student_classifier[0].weight.grad = None
    formula(naive, student.map(torch.Tensor.double), teacher.map(torch.Tensor.double), batch).backward()
    torch.testing.assert_close(own.weight.grad.double(), naive.student_classifier[0].weight.grad, rtol=1e-4, atol=1e-7)
    assert own.weight.grad.any() and not list(p for p in loss.parameters() if p.requires_grad)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradient(shapes):
    loss, student, teacher, batch = cat(*shapes, size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_the_scale_of_a_class_s_map_does_not_matter():
    loss, student, teacher, batch = cat((3, 4, 4), (3, 4, 4))
    value = loss(student, teacher, batch).item()
    with torch.no_grad():
        loss.student_classifier[0].weight.mul_(3)
    assert loss(student, teacher, batch).item() == pytest.approx(value)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-4])
def test_faint_maps_have_bounded_gradients(scale):
    loss, student, teacher, batch = cat((3, 4, 4), (5, 4, 4), size=1)
    f = (scale * student.features["a"]).requires_grad_()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


def test_keeps_the_promises_at_another_resolution():
    check_loss(CAT, r=3)


def test_refuses_what_has_no_activation_maps():
    context = kdkit.Context(*networks((3,), (5,)), CLASSES, 64, torch.arange(64) % CLASSES)
    with pytest.raises(kdkit.ShapeError, match="needs both networks' classifiers"):
        CAT(CAT.Options(layers=PAIR)).setup(random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}, seed=1))
    with pytest.raises(kdkit.ShapeError, match="one pair, not 2"):
        cat((3, 4, 4), (5, 4, 4), layers=PAIR * 2)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(4, 3, 1, 1\) and teacher 'b' \(4, 5, 4, 4\) must have several positions"):
        cat((3, 1, 1), (5, 4, 4))
    s, t = answers((context.student, context.teacher), (3, 4, 4), (5, 4, 4), 4)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' .* its head is more than"):
        CAT(CAT.Options(layers=PAIR)).setup(kdkit.Outputs(-s.logits, s.features), t, context)
