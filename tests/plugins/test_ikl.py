import copy
import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

IKL = registry.load().losses["ikl"]
GKL = {"beta": 16.0, "prior_temperature": 4.0, "power": 0.05, "normalize": True}
OPTIONS = [{}, GKL, {"alpha": 0.0}, {"beta": 0.0}, {"power": 0.0}, {"prior_temperature": 1.0, "temperature": 1.0, "power": 2.0}]
OF_CLASS = [{"prior": "class", "prior_temperature": 1.0}, {"prior": "class", **GKL}]


def ikl(size=6, classes=5, seen=0, **options):
    """The loss, set up, and what it compares; with `seen` batches in its table."""
    loss = IKL(IKL.Options(**options))
    student, teacher = (random_outputs(size=size, classes=classes, seed=seed) for seed in (0, 1))
    loss.setup(student, teacher)
    for seed in range(seen):
        loss(student, random_outputs(size=size, classes=classes, seed=10 + seed), random_batch(size, classes))
    return loss, student, teacher, random_batch(size, classes)


def softmax(z):
    return z.exp() / z.exp().sum()


def formula(loss, student, teacher, batch):
    """Pair by pair of classes; the table of priors is the loss's own, before the batch."""
    o, first, soft, weights = loss.options, 0, 0, 0
    for z_s, z_t, label in zip(student.logits, teacher.logits, batch.classes, strict=True):
        prior = loss.means[label] if o.prior == "class" else softmax(z_t / o.prior_temperature)
        w, d = prior**o.power, z_t - z_s
        for j in range(len(d)):
            for k in range(len(d)):
                first, weights = first + w[j] * w[k] * (d[j] - d[k]) ** 2, weights + w[j] * w[k]
        soft = soft - (softmax(z_t / o.temperature) * softmax(z_s / o.temperature).log()).sum()
    n = len(batch.classes)
    return o.beta / 4 * first / (weights if o.normalize else n) + o.alpha * soft / n


@pytest.mark.parametrize("options", [*OPTIONS, *OF_CLASS], ids=str)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (3, 2), (8, 4)])
def test_is_the_formula(size, classes, options):
    loss, *answers = ikl(size, classes, seen=2, **options)
    assert_agrees(loss.eval(), formula, *answers)


def test_two_classes_by_hand():
    """d = (log 3, 0), w = (1/2, 1/2): two pairs of log(3)^2 / 4, a quarter of them times beta."""
    loss = IKL(IKL.Options(alpha=0.0, beta=8.0, power=0.0))
    student, teacher = kdkit.Outputs(torch.zeros(1, 2)), kdkit.Outputs(torch.tensor([[math.log(3), 0.0]]))
    assert loss(student, teacher, random_batch(1)).item() == pytest.approx(8 / 4 * 2 * math.log(3) ** 2)
    loss = IKL(IKL.Options(alpha=0.0, prior_temperature=1e6))
    assert loss(student, teacher, random_batch(1)).item() == pytest.approx(8 / 4 * 2 * math.log(3) ** 2 / 4, rel=1e-4)


def test_the_teachers_logits_are_the_minimum_up_to_a_shift():
    z = random_outputs(seed=1).logits.requires_grad_()
    loss, _, teacher, batch = ikl()
    loss(kdkit.Outputs(z + 3.0), teacher, batch).backward()
    assert z.grad.abs().max() < 1e-5


def test_far_logits_do_not_cancel_in_fp32():
    """All margins are equal but for 0.01, on top of 1e4: the sum over pairs is small, and never negative."""
    d = torch.tensor([[1e4, 1e4 + 0.01, 1e4]])
    loss = IKL(IKL.Options(alpha=0.0, power=0.0))
    value = loss(kdkit.Outputs(-d), kdkit.Outputs(torch.zeros(1, 3)), random_batch(1, 3)).item()
    assert value == pytest.approx(8 / 4 * 4 * 0.01**2, rel=0.05)


def test_the_table_holds_the_mean_answer_of_each_class():
    """Batches of several sizes; a class that was not seen keeps 1 / K, and the batch itself counts for the next one only."""
    loss = IKL(IKL.Options(prior="class", prior_temperature=2.0))
    loss.setup(random_outputs(), random_outputs())
    seen = {c: [] for c in range(5)}
    for seed, size in enumerate((4, 1, 3)):
        teacher, batch = random_outputs(size=size, seed=seed), random_batch(size)
        for z, c in zip(teacher.logits, batch.labels.tolist(), strict=True):
            seen[c].append((z / 2).softmax(0))
        loss(random_outputs(size=size), teacher, batch)
    for c, answers in seen.items():
        torch.testing.assert_close(loss.means[c], torch.stack(answers).mean(0) if answers else torch.full((5,), 0.2))
    assert loss.counts.tolist() == [3, 2, 2, 1, 0]


def test_the_first_batch_has_uniform_weights():
    loss, *answers = ikl(prior="class", prior_temperature=1.0)
    uniform = ikl(power=0.0, beta=8.0 / 25)[0]
    torch.testing.assert_close(loss(*answers), uniform(*answers))
    assert loss(*answers) != uniform(*answers)


def test_in_eval_mode_nothing_is_remembered_and_the_state_is_all_there_is():
    loss, student, teacher, batch = ikl(seen=1, prior="class")
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(student, teacher, batch)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    other = ikl(prior="class")[0].eval()
    other.load_state_dict(before)
    assert torch.equal(other(student, teacher, batch), loss(student, teacher, batch))
    assert not ikl()[0].state_dict()


def test_mixed_labels_count_as_their_largest_share():
    loss, student, teacher, batch = ikl(seen=1, prior="class", prior_temperature=1.0)
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    mixed = kdkit.Batch(batch.inputs, shares, batch.index)
    assert loss.eval()(student, teacher, mixed) == loss(student, teacher, batch)


@pytest.mark.parametrize("options", [GKL, {"alpha": 0.0}, *OF_CLASS])
def test_keeps_the_promises_with_options(options):
    check_but(IKL, **options)
