import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

LOSSES = registry.load().losses
VirtualTeacher, LogitKL = LOSSES["virtual_teacher"], LOSSES["logit_kl"]


def loss(**options):
    return VirtualTeacher(VirtualTeacher.Options(**options))


def formula(loss, student, teacher, batch):
    """Probabilities raised to 1 / T, one sample and one class at a time."""
    o, (n, k), total = loss.options, student.logits.shape, 0
    for z, label in zip(student.logits, batch.labels, strict=True):
        t_s = o.temperature if o.soften_student else 1.0
        p = (z / t_s).exp() / (z / t_s).exp().sum()
        u = [o.correct if c == label else (1 - o.correct) / (k - 1) for c in range(k)]
        soft = [x ** (1 / o.temperature) for x in u]
        q = torch.tensor([x / sum(soft) for x in soft], dtype=torch.float64)
        total = total + t_s**2 * sum(q[c] * (q[c] / p[c]).log() for c in range(k))
    return total / n


@pytest.mark.parametrize("options", [{}, {"correct": 0.9, "temperature": 1.0}, {"soften_student": False}, {"correct": 0.05}])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2), (64, 7)])
def test_is_the_formula(size, classes, options):
    assert_agrees(loss(**options), formula, random_outputs(size=size, classes=classes), random_outputs(), random_batch(size, classes))


def test_is_logit_kl_with_a_teacher_made_by_hand():
    student, batch = random_outputs(), random_batch()
    u = torch.full((6, 5), 0.1 / 4).scatter(1, batch.labels[:, None], 0.9)
    wanted = LogitKL(LogitKL.Options(temperature=20.0))(student, kdkit.Outputs(u.log()), batch)
    torch.testing.assert_close(loss(correct=0.9)(student, student, batch), wanted)


def test_at_temperature_1_it_is_label_smoothing_but_for_a_constant():
    """Section 3: smoothing gives the label 1 - s + s / K and every other class s / K."""
    student, batch = random_outputs().map(torch.Tensor.double), random_batch()
    z = student.logits.requires_grad_()
    smooth = LOSSES["cross_entropy"](LOSSES["cross_entropy"].Options(label_smoothing=0.2))
    ours = loss(correct=0.84, temperature=1.0)
    one, other = (torch.autograd.grad(f(kdkit.Outputs(z), student, batch), z)[0] for f in (ours, smooth))
    torch.testing.assert_close(one, other)


def test_mixed_labels_mix_the_targets():
    student, a, b = random_outputs(), 0.9, 0.1 / 4
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0]]).expand(6, 5)
    batch = kdkit.Batch(random_batch().inputs, shares, torch.arange(6))
    u = torch.tensor([0.7 * a + 0.3 * b, 0.3 * a + 0.7 * b, b, b, b]).expand(6, 5)
    wanted = LogitKL(LogitKL.Options(temperature=3.0))(student, kdkit.Outputs(u.log()), batch)
    torch.testing.assert_close(loss(correct=0.9, temperature=3.0)(student, student, batch), wanted)


@pytest.mark.parametrize("options", [{}, {"soften_student": False}])
def test_gradient(options):
    z, batch = random_outputs(size=4).logits.double().requires_grad_(), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(**options)(kdkit.Outputs(z), kdkit.Outputs(z), batch), z)


def test_keeps_the_promises_unsoftened():
    check_loss(VirtualTeacher, soften_student=False)


def test_refuses_another_number_of_classes():
    context = kdkit.Context(torch.nn.Identity(), None, num_classes=7, num_samples=1, labels=torch.zeros(1))
    with pytest.raises(kdkit.ShapeError, match=r"\(6, 5\).*\(B, 7\)"):
        loss().setup(random_outputs(), random_outputs(), context)
    with pytest.raises(kdkit.ShapeError, match="two classes"):
        loss().setup(random_outputs(classes=1), random_outputs(classes=1))
