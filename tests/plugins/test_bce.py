import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

BCE = registry.load().losses["bce"]


def loss(**options):
    made = BCE(BCE.Options(**options))
    made.setup(random_outputs(classes=3), random_outputs())
    return made


def formula(loss, student, teacher, batch):
    """One question at a time."""
    total, smoothing = 0, loss.options.label_smoothing
    weights = torch.as_tensor(loss.options.pos_weight).expand(student.logits.shape[1]).tolist()
    for z, labels in zip(student.logits, batch.labels, strict=True):
        for k, weight in enumerate(weights):
            y = (1 - smoothing) * labels[k] + smoothing * 0.5
            p = 1 / (1 + (-z[k]).exp())
            total = total - weight * y * p.log() - (1 - y) * (1 - p).log()
    return total / student.logits.numel()


@pytest.mark.parametrize("options", [{}, {"pos_weight": 2.5}, {"pos_weight": (0.5, 1, 4)}, {"label_smoothing": 0.2, "pos_weight": 3}])
@pytest.mark.parametrize("size", [1, 7])
def test_is_the_formula(size, options):
    batch = random_batch(size, 3, rows="labels")
    for labels in (batch.labels, batch.labels * 0.3 + 0.1):
        shares = kdkit.Batch(batch.inputs, labels, batch.index)
        assert_agrees(loss(**options), formula, random_outputs(size=size, classes=3), random_outputs(), shares)


def test_a_weight_of_two_counts_what_holds_twice():
    z, y = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    value = loss(pos_weight=2)(kdkit.Outputs(z), kdkit.Outputs(z), kdkit.Batch(z, y, torch.zeros(1)))
    assert value.item() == pytest.approx(4 * torch.tensor(2.0).log().item() / 3)


def test_keeps_the_promises_with_a_weight_for_each_label():
    check_loss(BCE, pos_weight=(1, 2, 3, 4, 5), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "classes", "says"),
    [({}, 5, r"student logits \(6, 5\).*\(B, 3\)"), ({"pos_weight": (1, 2)}, 3, "2 numbers of pos_weight for 3 labels")],
)
def test_refuses_other_labels(options, classes, says):
    network = torch.nn.Identity()
    context = kdkit.Context(network, None, outputs=3, num_samples=0, labels=torch.zeros(0, 3))
    with pytest.raises(kdkit.ShapeError, match=says):
        BCE(BCE.Options(**options)).setup(random_outputs(classes=classes), random_outputs(), context)
