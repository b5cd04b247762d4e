import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

RLD = registry.load().losses["rld"]
OPTIONS = [{}, {"label_temperature": 4.0}, {"alpha": 0.0}, {"beta": 0.0}, {"beta": 0.5, "temperature": 1.0}, {"standardize": True}]


def loss(**options):
    return RLD(RLD.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample and one class at a time."""
    o, total = loss.options, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        below = [c for c in range(len(z_t)) if z_t[c] < z_t[label]]
        top = z_t.argmax()
        if o.standardize:
            z_s, z_t = ((z - z.mean()) / (1e-7 + z.std(correction=1)) for z in (z_s, z_t))
        p, q = ((z / o.label_temperature).exp() / (z / o.label_temperature).exp().sum() for z in (z_s, z_t))
        rest_p, rest_q = sum(p[c] for c in range(len(p)) if c != label), sum(q[c] for c in range(len(q)) if c != top)
        confidence = q[top] * (q[top] / p[label]).log() + rest_q * (rest_q / rest_p).log()
        exps = [(z / o.temperature).exp() for z in (z_s, z_t)]
        sums = [sum(e[c] for c in below) for e in exps]
        among = sum(exps[1][c] / sums[1] * (exps[1][c] / sums[1] / (exps[0][c] / sums[0])).log() for c in below)
        total = total + o.alpha * o.label_temperature**2 * confidence + o.beta * o.temperature**2 * among
    return total / len(batch.classes)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (3, 4), (16, 7)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(
        loss(**options),
        formula,
        student,
        teacher.map(lambda z: z + 2 * torch.eye(classes)[torch.arange(size) % classes]),
        random_batch(size, classes),
    )


def test_two_classes_by_hand():
    """The teacher takes class 1 for sure at 3/4, the label is 0: 3/4 of the confidence is wanted for it, and nothing is below it."""
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[0.0, math.log(3)]]))
    assert loss()(student, teacher, random_batch(1)).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("z_t", [[0.0, 1, 2, 3], [1, 1, 1, 1], [1, 1, 2, 1], [1, 0, 2, 3], [2, 1, 2, 2]], ids=str)
def test_at_most_one_class_below_the_label_adds_exactly_nothing(z_t):
    """The label, class 0, is the teacher's last or last but one; a tie with it is not below it."""
    z = random_outputs(size=1, classes=4).logits.requires_grad_()
    value = loss(alpha=0.0)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([z_t])), random_batch(1, 4))
    value.backward()
    assert value.item() == 0 and not z.grad.any()


def test_classes_above_the_label_are_not_compared():
    student, batch = random_outputs(size=1), random_batch(1)
    z = student.logits.clone().requires_grad_()
    loss(alpha=0.0)(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1.0, 5.0, 0.0, -1.0, 1.0]])), batch).backward()
    assert [bool(x) for x in z.grad[0]] == [False, False, True, True, False]


@pytest.mark.parametrize("margin", [100.0, 1e4])
def test_large_margins_have_the_limit_of_the_formula(margin):
    """The teacher is sure of class 1, the student that it is not the label, class 0."""
    z = torch.tensor([[-margin, 0.0, 0.0]], requires_grad=True)
    value = loss()(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[0.0, margin, 0.0]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(margin + math.log(2))
    torch.testing.assert_close(z.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_mixed_labels_count_as_their_largest_share():
    batch, student, teacher = random_batch(), random_outputs(), random_outputs(seed=1)
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss()(student, teacher, batch) == loss()(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"beta": 0.5, "temperature": 1.0}, {"standardize": True, "label_temperature": 4.0}])
def test_keeps_the_promises_with_options(options):
    # without the first part, classes above the label have no gradient
    but = ["check_teaches_every_part"] if not options.get("alpha", 1.0) else []
    check_but(RLD, *but, **options)


@pytest.mark.parametrize("classes", [(5, 7), (1, 1)])
def test_refuses_other_classes(classes):
    with pytest.raises(kdkit.ShapeError, match=rf"logits \(6, {classes[0]}\)"):
        loss().setup(*(random_outputs(classes=k) for k in classes))
