import math

import pytest
import torch
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

CRLD = registry.load().losses["crld"]
EVERY = {"threshold": 0.0, "second_threshold": 0.0}
OPTIONS = [
    {"threshold": 0.4},
    {**EVERY, "temperature": 1.0, "within": 1.0},
    {**EVERY, "within": 0.0},
    {**EVERY, "across": 0.0},
    {"threshold": 0.4, "second_threshold": 0.5, "label_weight": 1.0},
]


def loss(**options):
    return CRLD(CRLD.Options(**options))


def answers(size=6, classes=5):
    return [random_outputs(size=size, classes=classes, seed=seed, views={"second": 1}) for seed in (0, 1)]


def formula(loss, student, teacher, batch):
    """Sample by sample, view by view."""
    o, total = loss.options, 0
    for i, label in enumerate(batch.classes.tolist()):
        s, t = ([x.logits[i], x.views["second"].logits[i]] for x in (student, teacher))
        for a in (0, 1):
            for b in (0, 1):
                q, p = ((z / o.temperature).exp() / (z / o.temperature).exp().sum() for z in (t[a], s[b]))
                seen, least, factor = (t[0], o.threshold, o.within) if a == b else (t[1], o.second_threshold, o.across)
                if (seen.exp() / seen.exp().sum()).max() >= least:
                    total = total + o.temperature**2 * factor * (q * (q.log() - p.log())).sum()
        total = total - o.label_weight * (s[1].exp() / s[1].exp().sum())[label].log()
    return total / len(batch.classes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (3, 3), (32, 4)])
def test_is_the_formula(size, classes, options):
    assert_agrees(loss(**options), formula, *answers(size, classes), random_batch(size, classes))


def test_two_views_by_hand():
    """The student knows nothing; the teacher is at 3/4 of one view and at 1/2 of the other: D is d or 0 from them."""
    student = kdkit.Outputs(torch.zeros(1, 2)).seen_beside({"second": kdkit.Outputs(torch.zeros(1, 2))})
    views = kdkit.Outputs(torch.tensor([[math.log(3), 0.0]])), kdkit.Outputs(torch.zeros(1, 2))
    d = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for first, second, within, across in ((0.7, 0.5, 1, 1), (0.8, 0.5, 0, 1), (0.7, 0.6, 1, 0)):
        for own, other in (views, views[::-1]):
            teacher = own.seen_beside({"second": other})
            value = loss(temperature=1.0, threshold=first, second_threshold=second)(student, teacher, random_batch(1))
            if own is views[0]:
                assert value.item() == pytest.approx(2 * within * d + 0.5 * across * d)
    assert loss(temperature=1.0)(student, teacher, random_batch(1)).item() == pytest.approx(0.5 * d)  # sure of the second view only


def test_samples_below_a_threshold_count_as_zero():
    """The mean is over all of them."""
    (student, teacher), batch = answers(), random_batch()
    sure = teacher.logits.softmax(1).amax(1) >= 0.6
    assert 0 < sure.sum() < 6
    value = loss(across=0.0, threshold=0.6)(student, teacher, batch)
    each = [
        loss(across=0.0, threshold=0.0)(*(x.map(lambda z, i=i: z[i : i + 1]) for x in (student, teacher)), random_batch(1))
        for i in range(6)
    ]
    torch.testing.assert_close(value, (torch.stack(each) * sure).mean())


def test_labels_are_read_only_if_they_count():
    (student, teacher), batch = answers(), random_batch()
    hidden = kdkit.Batch(batch.inputs, batch.labels, batch.index, labelled=2).without_labels()
    assert loss()(student, teacher, hidden) == loss()(student, teacher, batch)
    with pytest.raises(kdkit.KdkitError):
        loss(label_weight=1.0)(student, teacher, hidden)


def test_refuses_answers_to_one_view():
    with pytest.raises(kdkit.ShapeError, match="second: true"):
        loss().setup(random_outputs(), random_outputs())


@pytest.mark.parametrize("options", OPTIONS)
def test_keeps_the_promises_with_options(options):
    # samples below a threshold teach nothing
    check_but(CRLD, "check_teaches_every_part", **options)
