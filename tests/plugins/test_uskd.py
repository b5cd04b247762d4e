import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_takes_mixed_labels, random_batch, random_outputs

USKD = registry.load().losses["uskd"]
MIDDLE = [{"student": "a", "teacher": "a"}]


def uskd(shape=(6, 4, 4), count=6, classes=5, **options):
    """The loss, set up, and what it compares."""
    loss, student = USKD(USKD.Options(layers=MIDDLE, **options)), random_outputs({"a": shape}, size=count, classes=classes)
    torch.manual_seed(0)
    loss.setup(student, None)
    return loss, student, random_outputs(classes=classes), random_batch(count, classes)


def of_shares(batch, shares):
    return kdkit.Batch(batch.inputs, torch.tensor(shares), batch.index)


def labels_of(batch, n, classes):
    """The labels of a sample with their shares, and the shares of all classes."""
    if batch.labels.ndim == 1:
        return {int(batch.labels[n]): 1.0}, [float(c == batch.labels[n]) for c in range(classes)]
    shares = [float(share) for share in batch.labels[n]]
    two = sorted(range(classes), key=lambda c: -shares[c])[:2]
    return {c: shares[c] for c in two}, shares


def formula(loss, student, teacher, batch):
    """Sample by sample, class by class."""
    o, f = loss.options, student.features["a"]
    f = f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))
    z, weak = student.logits, f @ loss.weak.weight.T + loss.weak.bias
    count, classes = z.shape
    p, w = z.softmax(1), weak.softmax(1)
    chosen = [labels_of(batch, n, classes) for n in range(count)]
    squares = [[p[n, c].item() ** 2 for c in labels] for n, (labels, _) in enumerate(chosen)]
    means = [sum(row[k] for row in squares) / count for k in range(len(squares[0]))]
    total = 0
    for n, (labels, shares) in enumerate(chosen):
        for k, (c, share) in enumerate(labels.items()):
            v = max(squares[n][k] + share - means[k], 0) if share > 0 else 0
            total = total - o.alpha * v * p[n, c].log()
        real = [c for c, share in labels.items() if share > 0]
        others = [c for c in range(classes) if c not in real]
        x = p[n].detach() if o.ranking == "paper" else p[n].detach().log()
        score = w[n].detach() / (1 - w[n, real].detach().sum() + 1e-6) + x / (1 - x[real].sum() + 1e-6)
        rank = {c: 1 + sum(bool(score[d] > score[c]) for d in range(classes)) for c in others}
        zipf = {c: 1 / rank[c] / sum(1 / r for r in rank.values()) for c in others}
        total = total - o.beta * sum(zipf[c] * z[n, others].log_softmax(0)[others.index(c)] for c in others)
        smooth = [(1 - o.smoothing) * share + o.smoothing / classes for share in shares]
        total = total - o.mu * sum(t * w[n, c].log() for c, t in enumerate(smooth))
    return total / count


@pytest.mark.parametrize(
    "options", [{}, {"ranking": "released"}, {"alpha": 0.0, "beta": 1.0, "mu": 0.0}, {"mu": 1.0, "smoothing": 0.0}], ids=str
)
@pytest.mark.parametrize(("shape", "count", "classes"), [((6, 4, 4), 6, 5), ((9, 6), 1, 4), ((6,), 3, 2)], ids=str)
def test_is_the_formula(shape, count, classes, options):
    loss, *given = uskd(shape, count, classes, **options)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("options", [{}, {"ranking": "released", "mu": 1.0}], ids=str)
def test_is_the_formula_for_mixed_labels(options):
    """The last sample is not mixed, the one before has three labels, of which the two largest count."""
    loss, student, teacher, batch = uskd(count=4, classes=4, **options)
    mixed = of_shares(batch, [[0.7, 0.3, 0, 0], [0, 0.4, 0.6, 0], [0.2, 0, 0.3, 0.5], [0, 0, 0, 1.0]])
    assert_agrees(loss, formula, student, teacher, mixed)


def test_shares_of_one_label_are_that_label():
    loss, student, teacher, batch = uskd()
    shares = torch.nn.functional.one_hot(batch.labels, 5).float().tolist()
    torch.testing.assert_close(loss(student, teacher, of_shares(batch, shares)), loss(student, teacher, batch))


def test_a_mixed_label_never_pushes_away():
    """A share of 0.1 beside a batch whose mean of p^2 is 1/2: v would be negative, and p driven to 0."""
    loss, *_ = uskd((6,), 2, 3, beta=0.0, mu=0.0)
    z = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0]], requires_grad=True)
    shares = [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0]]
    value = loss(kdkit.Outputs(z, {"a": torch.zeros(2, 6)}), None, of_shares(random_batch(2, 3), shares))
    value.backward()
    assert z.grad[0, 1] >= 0 and z.grad[0, 0] <= 0 and value > 0


def test_ranks_by_hand():
    """The weak classifier knows nothing: the student's own order counts, and the label's rank is left out."""
    loss, *_ = uskd((6,), 1, 4, alpha=0.0, beta=1.0, mu=0.0)
    with torch.no_grad():
        loss.weak.weight.zero_()
        loss.weak.bias.zero_()
    z = torch.tensor([[2.0, 3.0, 0.0, 1.0]])  # label 0 has rank 2; classes 1, 3, 2 have 1, 3, 4
    value = loss(kdkit.Outputs(z, {"a": torch.zeros(1, 6)}), None, random_batch(1, 4))
    zipf = torch.tensor([1, 1 / 4, 1 / 3]) / (1 + 1 / 4 + 1 / 3)
    torch.testing.assert_close(value, -(zipf * z[0, 1:].log_softmax(0)).sum())


def test_one_sample_has_the_plain_cross_entropy():
    loss, student, teacher, batch = uskd(count=1, beta=0.0, mu=0.0)
    torch.testing.assert_close(loss(student, teacher, batch), torch.nn.functional.cross_entropy(student.logits, batch.labels))


def test_equal_classes_are_ranked_by_number():
    loss, *_ = uskd((6,), 1, 3, alpha=0.0, beta=1.0, mu=0.0)
    with torch.no_grad():
        loss.weak.weight.zero_()
        loss.weak.bias.zero_()
    z = torch.zeros(1, 3, requires_grad=True)
    value = loss(kdkit.Outputs(z, {"a": torch.zeros(1, 6)}), None, random_batch(1, 3))
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(z.grad[0], torch.tensor([0.0, 0.5 - 0.6, 0.5 - 0.4]))


def test_takes_mixed_labels_of_two_classes_and_the_released_ranking():
    check_takes_mixed_labels(USKD, layers=MIDDLE, ranking="released")
    loss, student, teacher, batch = uskd(classes=2)
    assert loss(student, teacher, of_shares(batch, [[0.7, 0.3]] * 6)).isfinite()


def test_refuses():
    with pytest.raises(kdkit.ShapeError, match="reads one layer of the student, not a, b: "):
        USKD(USKD.Options(layers=[{"student": "a", "teacher": "b"}])).setup(random_outputs({"a": (6,), "b": (6,)}), None)
    with pytest.raises(kdkit.ShapeError, match=r"logits \(6, 1\) must be"):
        uskd(classes=1)
