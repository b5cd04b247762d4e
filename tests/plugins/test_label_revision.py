import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LabelRevision = registry.load().losses["label_revision"]
OPTIONS = [{}, {"logit_weight": 0.0}, {"revision_weight": 3.0, "eta": 0.3}, {"eta": 0.0}, {"eta": 1.0, "logit_weight": 1.0}]


def loss(**options):
    return LabelRevision(LabelRevision.Options(**options))


def formula(loss, student, teacher, batch):
    """Two lists of samples."""
    o, right, wrong = loss.options, [], []
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes.tolist(), strict=True):
        p, q = (z.exp() / z.exp().sum() for z in (z_s, z_t))
        if z_t.argmax() == label:
            right.append(-p[label].log() + o.logit_weight * ((z_s - z_t) ** 2).mean())
            continue
        b = o.eta / (q.max() - q[label] + 1)
        target = [b * q[c] + (1 - b) * (c == label) for c in range(len(q))]
        wrong.append(o.revision_weight * sum((p[c] - target[c]) ** 2 for c in range(len(q))) / len(q))
    return 0 * student.logits.sum() + sum(sum(group) / len(group) for group in (right, wrong) if group)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (4, 3), (24, 4)])
def test_is_the_formula(size, classes, options):
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    assert_agrees(loss(**options), formula, student, teacher, random_batch(size, classes))


def test_two_samples_by_hand():
    """Right: cross-entropy log 2 and 4 * log(3)^2 / 2. Wrong, at q = (1/4, 3/4): b = 0.8 / 1.5, target 1 - 3/4 b for the label."""
    z_t = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    student, batch = kdkit.Outputs(torch.zeros(2, 2)), random_batch(2)  # labels 0 and 1
    error = (0.5 - (1 - 0.75 * 0.8 / 1.5)) ** 2
    assert loss()(student, kdkit.Outputs(z_t), batch).item() == pytest.approx(math.log(2) + 2 * math.log(3) ** 2 + error)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_one_of_the_two_groups_may_be_empty(labels):
    z = random_outputs(size=2, classes=2).logits.requires_grad_()
    batch = kdkit.Batch(random_batch(2).inputs, torch.tensor(labels), torch.arange(2))
    value = loss()(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1.0, 0.0], [2.0, 0.0]])), batch)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all() and z.grad.any()


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.8, 0.99])
def test_the_label_is_the_likeliest_of_revised_probabilities(eta):
    """The point of b: also for a teacher that is certain of another class."""
    batch, z = random_batch(64, 5), 20 * random_outputs(size=64).logits
    target = loss(eta=eta).revised(z, batch)
    assert torch.equal(target.argmax(1), batch.labels)
    torch.testing.assert_close(target.sum(1), torch.ones(64))


def test_mixed_labels_are_mixed_targets():
    batch, student, teacher = random_batch(), random_outputs(), random_outputs(seed=1)
    whole = torch.nn.functional.one_hot(batch.labels, 5).float()
    mixed = kdkit.Batch(batch.inputs, whole, batch.index)
    torch.testing.assert_close(loss()(student, teacher, mixed), loss()(student, teacher, batch))
    shares = 0.6 * whole + 0.4 * whole.roll(1, 1)
    target, q = loss().revised(teacher.logits, kdkit.Batch(batch.inputs, shares, batch.index)), teacher.logits.softmax(1)
    b = 0.8 / (q.amax(1) - q[torch.arange(6), batch.labels] + 1)
    torch.testing.assert_close(target, b[:, None] * q + (1 - b[:, None]) * shares)


@pytest.mark.parametrize("options", [{"logit_weight": 0.0}, {"eta": 1.0, "revision_weight": 3.0}])
def test_keeps_the_promises_with_options(options):
    check_but(LabelRevision, **options)
