import math

import pytest
import torch
from torch import nn

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

WKD = registry.load().losses["wkd_logit"]


def network(rows):
    """One that ends in a linear layer with these weights."""
    linear = nn.Linear(len(rows[0]), len(rows))
    linear.weight.data = torch.as_tensor(rows)
    return nn.Sequential(linear)


def wkd(size=6, classes=5, rows=None, **options):
    """The loss, set up, and what it compares."""
    loss = WKD(WKD.Options(**options))
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    rows = torch.randn(classes, 3, generator=torch.Generator().manual_seed(2)) if rows is None else rows
    context = kdkit.Context(network(rows), network(rows), classes, 0, torch.empty(0))
    loss.setup(student, teacher, context)
    return loss, student, teacher, random_batch(size, classes)


def plan(p, q, cost, regularization, iterations):
    """Sinkhorn's scaling of exp(-cost / regularization), without logarithms."""
    kernel = (-cost / regularization).exp()
    u = torch.ones_like(p) / len(p)
    for _ in range(iterations):
        v = q / (kernel.T @ u)
        u = p / (kernel @ v)
    return u[:, None] * kernel * v


def formula(loss, student, teacher, batch):
    """One sample at a time, the label's class cut out."""
    o, total = loss.options, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        total = total - z_t.exp()[label] / z_t.exp().sum() * (z_s.exp()[label] / z_s.exp().sum()).log()
        others = [c for c in range(len(z_s)) if c != label]
        cost = loss.cost[others][:, others]
        p, q = ((z[others] / o.temperature).exp() / (z[others] / o.temperature).exp().sum() for z in (z_s, z_t))
        total = total + o.gamma * (plan(p, q, cost, o.regularization, o.iterations) * cost).sum()
    return total / len(batch.classes)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"iterations": 1}, {"sharpness": 0.0}, {"regularization": 0.5, "iterations": 30, "gamma": 9.0}]
)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 7)])
def test_is_the_formula(size, classes, options):
    loss, *answers = wkd(size, classes, **options)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_the_cost_is_the_unlikeness_of_the_teachers_classes(sharpness):
    loss, *_ = wkd(classes=4, rows=[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], sharpness=sharpness)
    unlike = [[0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]]
    expected = [[1 - math.exp(-sharpness * d) if sharpness else d for d in row] for row in unlike]
    torch.testing.assert_close(loss.cost, torch.tensor(expected, dtype=torch.float))


def test_moving_to_a_like_class_costs_less():
    """The label is class 0; the teacher's other class is 1; class 2 is like it, class 3 is not."""
    loss, *_ = wkd(classes=4, rows=[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, -1.0, 0.0]], temperature=1.0)
    certain = [kdkit.Outputs(10.0 * torch.eye(4)[[c]]) for c in range(4)]
    same, like, unlike = (loss(certain[c], certain[1], random_batch(1)).item() for c in (1, 2, 3))
    assert same < like < unlike


def test_logits_of_ten_thousand_pay_the_cost():
    """All of the student's other probability is on class 1, all of the teacher's on class 2."""
    loss, *_ = wkd(classes=4, temperature=1.0)
    student, teacher = (torch.tensor([[0.0, *row]]) for row in ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]))
    z = student.requires_grad_()
    value = loss(kdkit.Outputs(z), kdkit.Outputs(teacher), random_batch(1))
    value.backward()
    torch.testing.assert_close(value, loss.cost[1, 2])
    assert z.grad.isfinite().all()


def test_two_classes_leave_the_label():
    loss, *_ = wkd(classes=2)
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    assert loss(student, teacher, random_batch(1)).item() == pytest.approx(0.75 * math.log(2))


def test_mixed_labels_count_as_their_largest_share():
    loss, student, teacher, batch = wkd()
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss(student, teacher, batch) == loss(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


def test_gradient():
    loss, student, teacher, batch = wkd(size=4)
    z = student.logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss.double()(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


@pytest.mark.parametrize("options", [{"temperature": 1.0, "iterations": 50}, {"sharpness": 0.0, "regularization": 0.025}])
def test_keeps_the_promises_with_options(options):
    check_loss(WKD, **options)


def test_opposed_classes_at_the_least_regularization():
    """Costs of 2 over 0.025: the kernel is exp(-80)."""
    rows = [[1.0], [1.0], [-1.0], [-1.0]]
    loss, *answers = wkd(classes=4, rows=rows, sharpness=0.0, regularization=0.025, temperature=1.0)
    assert_agrees(loss, formula, *answers)


def test_by_hand_it_asks_for_the_teacher():
    with pytest.raises(kdkit.ShapeError, match=r"give setup a kdkit\.Context"):
        WKD(WKD.Options()).setup(random_outputs(), random_outputs(seed=1))


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        WKD(WKD.Options()).setup(random_outputs(), random_outputs(classes=7))
    with pytest.raises(kdkit.ShapeError, match=r"classifier \(1, 2\).*\(6, 1\)"):
        wkd(classes=1, rows=[[1.0, 2.0]])


# cost: cka


LABELS = torch.tensor([2, 0, 1, -1, 0, 2, 0, 1, 2, 0, 3])
"""Of images by their places; one is not trained on, and class 3 has a single one."""
VALUES = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cka_loss(images=3, labels=LABELS, values=VALUES, classes=4, asked=None, **options):
    """The loss, set up by these values of the teacher, which are shown in two batches."""

    def survey(network, found):
        if asked is not None:
            asked.append(found)
        index = found.images
        batches = [kdkit.Batch(torch.empty(len(part), 0), labels[part], part) for part in index.split(4)]
        return found.of([(kdkit.Outputs(values[batch.index], {found.layers[0]: values[batch.index]}), batch) for batch in batches])

    loss = WKD(WKD.Options(cost="cka", images=images, **options))
    student, teacher = (random_outputs(classes=classes, seed=seed) for seed in (0, 1))
    loss.setup(student, teacher, kdkit.Context(network(torch.eye(4)), network(torch.eye(4)), classes, len(labels), labels, survey=survey))
    return loss, student, teacher, random_batch(6, classes)


def similarity(one, other):
    """Linear CKA of two classes by its definition, with a centring matrix; images that one lacks are rows of zeros."""
    size = max(len(one), len(other))
    grams = []
    for x in (one, other):
        h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
        gram = torch.zeros(size, size, dtype=x.dtype)
        gram[: len(x), : len(x)] = h @ x @ x.T @ h
        grams.append(gram)
    norms = [(gram @ gram.T).trace().sqrt() for gram in grams]
    return 0.0 if min(norms) < 1e-12 else float((grams[0] @ grams[1].T).trace() / (norms[0] * norms[1]))


@pytest.mark.parametrize("images", [2, 3, 100])
@pytest.mark.parametrize("sharpness", [0.0, 1.0])
def test_the_cost_by_cka(images, sharpness):
    loss, *_ = cka_loss(images, sharpness=sharpness)
    own = [VALUES[(c == LABELS).nonzero()[:images, 0]] for c in range(4)]
    for i in range(4):
        for j in range(4):
            distance = 0.0 if i == j else 1 - similarity(own[i], own[j])
            expected = 1 - math.exp(-sharpness * distance) if sharpness else distance
            assert loss.cost[i, j].item() == pytest.approx(expected, abs=1e-5), (i, j)


def test_a_class_with_one_image_is_unlike_all_others():
    loss, *_ = cka_loss(sharpness=0.0)
    torch.testing.assert_close(loss.cost[3], torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_the_first_images_of_each_class_are_asked_about_in_their_order():
    asked = []
    cka_loss(2, asked=asked, layer="penultimate")
    assert asked[0].images.tolist() == [0, 1, 2, 4, 5, 7, 10] and asked[0].layers == ("penultimate",)


def test_classes_whose_images_move_alike_are_alike():
    """The n-th image of class 1 is that of class 0, turned, moved and twice as far from the mean."""
    turn = torch.linalg.qr(VALUES[:4])[0]
    values = torch.cat([VALUES[:5], 2 * VALUES[:5] @ turn + 7, VALUES[5:10]])
    loss, *_ = cka_loss(5, torch.arange(15) // 5, values, classes=3, sharpness=0.0)
    assert loss.cost[0, 1].item() == pytest.approx(0, abs=1e-6) and loss.cost[0, 2] > 0.1


@pytest.mark.parametrize("options", [{}, {"temperature": 8.0, "gamma": 600.0}])
def test_is_the_formula_with_cka(options):
    loss, *answers = cka_loss(**options)
    assert_agrees(loss, formula, *answers)


def test_refuses_images_without_a_class_each():
    with pytest.raises(kdkit.ShapeError, match="no single class that is known before"):
        cka_loss(labels=torch.empty(0, dtype=torch.int64))
    with pytest.raises(kdkit.ShapeError, match="no single class"):
        cka_loss(labels=torch.ones(11, 4))


def test_keeps_the_promises_with_cka():
    check_loss(WKD, cost="cka", images=4)


def test_options_of_cka_are_read_with_it_only():
    with pytest.raises(ValueError, match="images is read with `cost: cka` only"):
        WKD.Options(images=5)
