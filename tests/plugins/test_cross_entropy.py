import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

CrossEntropy = registry.load().losses["cross_entropy"]


def loss(**options):
    return CrossEntropy(CrossEntropy.Options(**options))


def formula(loss, student, teacher, batch):
    """One sample and one class at a time."""
    smoothing, (n, k) = loss.options.label_smoothing, student.logits.shape
    total = 0
    for i in range(n):
        p = student.logits[i].exp() / student.logits[i].exp().sum()
        for c in range(k):
            share = batch.labels[i, c] if batch.labels.ndim == 2 else float(batch.labels[i] == c)
            total = total - ((1 - smoothing) * share + smoothing / k) * p[c].log()
    return total / n


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, smoothing):
    assert_agrees(loss(label_smoothing=smoothing), formula, random_outputs(size=size), random_outputs(), random_batch(size))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_takes_shares_of_the_classes(smoothing):
    shares = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    batch = kdkit.Batch(random_batch().inputs, shares / shares.sum(1, keepdim=True), torch.arange(6))
    assert_agrees(loss(label_smoothing=smoothing), formula, random_outputs(), random_outputs(), batch)


def test_undecided_student_costs_log_k():
    value = loss()(kdkit.Outputs(torch.zeros(3, 8)), random_outputs(), random_batch(3))
    assert value.item() == pytest.approx(torch.tensor(8.0).log().item())


def test_gradient():
    z, batch = random_outputs(size=4).logits.double().requires_grad_(), random_batch(4)
    assert torch.autograd.gradcheck(lambda z: loss(label_smoothing=0.1)(kdkit.Outputs(z), kdkit.Outputs(z), batch), z)


def test_large_logits_cost_their_margin():
    z = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = loss()(kdkit.Outputs(z), random_outputs(), kdkit.Batch(torch.zeros(1), torch.tensor([1]), torch.zeros(1)))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert z.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_has_bounds(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        loss(label_smoothing=smoothing)


def test_refuses_another_number_of_classes():
    context = kdkit.Context(torch.nn.Identity(), None, num_classes=7, num_samples=1, labels=torch.zeros(1))
    with pytest.raises(kdkit.ShapeError, match=r"\(6, 5\).*\(B, 7\)"):
        loss().setup(random_outputs(), random_outputs(), context)


def context(*labels, classes=3):
    return kdkit.Context(torch.nn.Identity(), None, classes, len(labels), torch.tensor(labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("asked", "weights"),
    [((2.0, 0.0, 0.5), (2.0, 0.0, 0.5)), ("balanced", (6 / (3 * 4), 6 / 3, 6 / 3))],
    ids=["written out", "balanced"],
)
def test_class_weights_multiply_each_samples_loss(asked, weights, smoothing):
    z, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 0])
    weighted, batch = loss(class_weights=asked, label_smoothing=smoothing), kdkit.Batch(torch.zeros(5), labels, torch.arange(5))
    weighted.setup(kdkit.Outputs(z), kdkit.Outputs(z), context(0, 0, 0, 0, 1, 2, -1))  # -1: an image that is not trained on
    target = (1 - smoothing) * torch.nn.functional.one_hot(labels, 3) + smoothing / 3
    expected = -(torch.tensor(weights) * target * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(weighted(kdkit.Outputs(z), kdkit.Outputs(z), batch), expected)


@pytest.mark.parametrize(
    ("asked", "known", "says"),
    [((1.0, 2.0), context(0, 1, 2), "2 class_weights for 3 classes"), ("balanced", context(), "write the 3 weights out")],
)
def test_class_weights_that_cannot_be(asked, known, says):
    outputs = kdkit.Outputs(torch.zeros(2, 3))
    with pytest.raises(kdkit.ShapeError, match=says):
        loss(class_weights=asked).setup(outputs, outputs, known)
