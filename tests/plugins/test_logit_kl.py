import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.outputs import DEGENERATE

LogitKL = registry.load().losses["logit_kl"]


def loss(**options):
    return LogitKL(LogitKL.Options(**options))


def temperatures(o, z_s, z_t):
    """Of the student and of the teacher, and the factor of the divergence."""
    if o.scale == "std":
        std_s, std_t = (1e-7 + z.std(correction=1) for z in (z_s, z_t))
        return o.temperature * std_s, o.temperature * std_t, (o.temperature * z_t.std(correction=1)) ** 2
    m_s, m_t = z_s.max(), z_t.max()
    if o.scale is None or min(m_s, m_t) < 1e-3:
        return o.temperature, o.temperature, o.temperature**2
    t_s, t_t = (2 * m / (m_s + m_t) * o.temperature for m in (m_s, m_t))
    return t_s, t_t, t_s * t_t


def formula(loss, student, teacher, batch):
    """Probabilities and logs written out, one sample at a time."""
    o, total, count = loss.options, 0 * student.logits.sum(), 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        if o.only_correct and z_t.argmax() != label:
            continue
        if o.swap:
            numbers, top = z_t.tolist(), z_t.argmax().item()
            numbers[label], numbers[top] = numbers[top], numbers[label]
            z_t = z_t.new_tensor(numbers)
        if o.standardize:
            z_s, z_t = ((z - z.mean()) / (1e-7 + z.std(correction=1)) for z in (z_s, z_t))
        t_s, t_t, factor = temperatures(o, z_s, z_t)
        p, q = ((z / t).exp() / (z / t).exp().sum() for z, t in ((z_s, t_s), (z_t, t_t)))
        total, count = total + factor * (q * (q.log() - p.log())).sum(), count + 1
    return total / max(count, 1)


OPTIONS = [
    {},
    {"temperature": 1.0},
    {"standardize": True, "temperature": 2.0},
    {"only_correct": True},
    {"standardize": True, "only_correct": True, "temperature": 1.0},
    {"swap": True},
    {"swap": True, "standardize": True, "temperature": 3.0},
    {"scale": "std", "temperature": 2.0},
    {"scale": "std", "only_correct": True, "temperature": 1.0},
    {"scale": "max"},
    {"scale": "max", "swap": True, "temperature": 1.0},
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


def test_swap_exchanges_two_logits_of_the_teacher_where_it_is_wrong():
    student, batch = random_outputs(size=2), random_batch(2)  # labels 0 and 1
    given, swapped = torch.tensor([[1.0, 5, 2, 0, 3], [1, 5, 2, 0, 3]]), torch.tensor([[5.0, 1, 2, 0, 3], [1, 5, 2, 0, 3]])
    teacher = kdkit.Outputs(given)
    assert loss(swap=True)(student, teacher, batch) == loss()(student, kdkit.Outputs(swapped), batch)
    shares = torch.tensor([[0.6, 0.4, 0, 0, 0], [0.4, 0.6, 0, 0, 0]])
    mixed = kdkit.Batch(batch.inputs, shares, batch.index)
    assert loss(swap=True)(student, teacher, mixed) == loss(swap=True)(student, teacher, batch)
    assert teacher.logits is given and given[0, 1] == 5


def test_scaled_by_the_deviation_neither_side_sees_its_size():
    """Only the factor does, that of the teacher."""
    student, teacher, batch = random_outputs(), random_outputs(seed=1), random_batch()
    value = loss(scale="std")(student, teacher, batch)
    torch.testing.assert_close(loss(scale="std")(student.map(lambda z: 3 * z + 7), teacher, batch), value)
    torch.testing.assert_close(loss(scale="std")(student, teacher.map(lambda z: 3 * z - 2), batch), 9 * value)


def test_scaled_by_the_largest_two_equal_rows_have_one_temperature():
    """M = 6 and 2: T_t = 1.5 T and T_s = T / 2, with 3 / 4 T^2."""
    student, teacher = kdkit.Outputs(torch.tensor([[2.0, 0.0]])), kdkit.Outputs(torch.tensor([[6.0, 0.0]]))
    assert loss(scale="max")(student, teacher, random_batch(1)).item() == pytest.approx(0, abs=1e-5)  # 2 / 2 = 6 / 6 at T = 4
    student = kdkit.Outputs(torch.tensor([[2.0, 1.0]]))
    p, q = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1))
    wanted = 0.75 * 16 * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
    assert loss(scale="max")(student, teacher, random_batch(1)).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("largest", [0.0, -1.0, 9e-4, -3.0])
def test_without_a_positive_largest_logit_the_temperature_is_fixed(largest):
    """Also where the two largest logits, 3 and -3, sum to 0."""
    z = torch.tensor([[largest, -4.0, -9.0]], requires_grad=True)
    teacher = kdkit.Outputs(torch.tensor([[3.0, 1.0, 2.0]]))
    scaled, fixed = (loss(scale=scale)(kdkit.Outputs(z), teacher, random_batch(1)) for scale in ("max", None))
    assert torch.equal(scaled, fixed)
    assert torch.equal(*(torch.autograd.grad(value, z)[0] for value in (scaled, fixed)))


@pytest.mark.parametrize("scale", ["std", "max"])
def test_constant_rows_are_finite_when_scaled(scale):
    for z_t in (random_outputs(size=2).logits, torch.full((2, 5), 3.3)):
        z = torch.full((2, 5), 3.3, requires_grad=True)
        value = loss(scale=scale)(kdkit.Outputs(z), kdkit.Outputs(z_t), random_batch(2))
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()
    assert value.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("options", [{"scale": "std", "standardize": True}, {"swap": True, "only_correct": True}])
def test_refuses_options_of_which_one_has_no_effect(options):
    with pytest.raises(ValueError, match="use one"):
        LogitKL.Options(**options)


@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"only_correct": True}, {"swap": True}, {"scale": "std"}, {"scale": "max"}])
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
    but = ["check_teaches_every_part"]  # some leave samples out
    if options.get("scale") == "std":
        # the value grows with the teacher's deviation: see below; -1e4 for new classes makes it larger
        but += ["check_survives_degenerate_inputs", "check_says_its_reduction"]
    check_but(LogitKL, *but, **options)


@pytest.mark.parametrize("form", DEGENERATE)
def test_scaled_by_the_deviation_it_survives_degenerate_inputs(form):
    """The gradient is finite, and below 1e6 unless logits are huge: the factor is the teacher's variance."""
    change_s, change_t = DEGENERATE[form]
    z = change_s(random_outputs().logits).requires_grad_()
    value = loss(scale="std")(kdkit.Outputs(z), random_outputs(seed=1).map(change_t), random_batch())
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all() and (z.grad.abs().max() < 1e6 or "e4" in form)


def test_equal_logits_have_no_direction():
    z = torch.full((2, 5), 3.3, requires_grad=True)
    loss(standardize=True)(kdkit.Outputs(z), random_outputs(size=2), random_batch(2)).backward()
    assert not z.grad.any()


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\).*class set"):
        loss().setup(random_outputs(), random_outputs(classes=7))
