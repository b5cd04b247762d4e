import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LogitKL = registry.load().losses["logit_kl"]


def loss(**options):
    return LogitKL(LogitKL.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample at a time."""
    o, total, count = loss.options, 0 * student.logits.sum(), 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        if o.only_correct and z_t.argmax() != label:
            continue
        if o.standardize:
            z_s, z_t = ((z - z.mean()) / (1e-7 + z.std(correction=1)) for z in (z_s, z_t))
        p, q = ((z / o.temperature).exp() / (z / o.temperature).exp().sum() for z in (z_s, z_t))
        total, count = total + (q * (q.log() - p.log())).sum(), count + 1
    return o.temperature**2 * total / max(count, 1)


OPTIONS = [
    {},
    {"temperature": 1.0},
    {"standardize": True, "temperature": 2.0},
    {"only_correct": True},
    {"standardize": True, "only_correct": True, "temperature": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 3), (64, 10)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_classes_by_hand():
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    value = loss(temperature=1.0)(student, teacher, random_batch(1))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_only_correct_leaves_the_others_out():
    batch, student = random_batch(), random_outputs()
    right = torch.nn.functional.one_hot(batch.labels, 5).float() * 5
    wrong = right.roll(1, 1)
    mixed = kdkit.Outputs(torch.cat([right[:2], wrong[2:]]))
    first_two = [kdkit.Outputs(x.logits[:2]) for x in (student, mixed)]
    value = loss(only_correct=True)(student, mixed, batch)
    torch.testing.assert_close(value, loss()(*first_two, random_batch(2)))
    assert loss(only_correct=True)(student, kdkit.Outputs(wrong), batch).item() == 0


def test_only_correct_reads_mixed_labels():
    batch = random_batch()
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    student, teacher = random_outputs(), random_outputs(seed=1)
    values = [
        loss(only_correct=True)(student, teacher, kdkit.Batch(batch.inputs, labels, batch.index)) for labels in (batch.labels, shares)
    ]
    assert values[0] == values[1]


def test_standardize_ignores_scale_and_shift():
    student, teacher = random_outputs(), random_outputs(seed=1)
    value = loss(standardize=True)(student, teacher, random_batch())
    moved = loss(standardize=True)(student.map(lambda z: 3 * z + 7), teacher.map(lambda z: 0.5 * z - 2), random_batch())
    torch.testing.assert_close(moved, value)


@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"only_correct": True}])
def test_gradient(options):
    z, teacher, batch = random_outputs(size=4).logits.double().requires_grad_(), random_outputs(size=4, seed=1), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(**options)(kdkit.Outputs(z), teacher.map(torch.Tensor.double), batch), z)


def test_opposed_logits_of_ten_thousand():
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss()(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == pytest.approx(4**2 * 2e4 / 4)
    assert z.grad.tolist() == [[-4.0, 4.0]]


@pytest.mark.parametrize("options", [*OPTIONS[1:], {"temperature": 0.5}, {"standardize": True, "temperature": 20.0}])
def test_keeps_the_promises_with_options(options):
    check_but(LogitKL, "check_teaches_every_part", **options)  # some leave samples out


def test_equal_logits_have_no_direction():
    z = torch.full((2, 5), 3.3, requires_grad=True)
    loss(standardize=True)(kdkit.Outputs(z), random_outputs(size=2), random_batch(2)).backward()
    assert not z.grad.any()


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\).*class set"):
        loss().setup(random_outputs(), random_outputs(classes=7))
