import pytest
import torch

import kdkit
from kdkit.contracts.task import serves
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_survives_degenerate_inputs, random_batch, random_outputs

PLUGINS = registry.load()
DistPlus = PLUGINS.losses["dist_plus"]
PAIR = [{"student": "a", "teacher": "b"}]


def dist_plus(student=(3, 4, 4), teacher=(5, 4, 4), count=6, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = DistPlus(DistPlus.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt() + 1e-8)


def mean(values):
    return sum(values) / len(values)


def formula(loss, student, teacher, batch):
    """One correlation after the other; maps of half the size are means of four."""
    o, (adapter,) = loss.options, loss.adapters
    p, q = ((z / o.temperature).softmax(1) for z in (student.logits, teacher.logits))
    rows, several = range(len(p)), len(p) > 1
    inter = 1 - mean([pearson(p[n], q[n]) for n in rows])
    intra = 1 - mean([pearson(p[:, c], q[:, c]) for c in range(p.shape[1])]) if several else 1
    f_s, f_t = student.features["a"], teacher.features["b"]
    if not isinstance(adapter, torch.nn.Identity):
        f_s = torch.einsum("oc,bchw->bohw", adapter.weight[:, :, 0, 0], f_s) + adapter.bias[:, None, None]
    if f_s.shape[2] == 2 * f_t.shape[2]:
        f_s = f_s.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    places = [(y, x) for y in range(f_s.shape[2]) for x in range(f_s.shape[3])]
    channel = 1 - mean([pearson(f_s[n, :, y, x], f_t[n, :, y, x]) for n in rows for y, x in places])
    spatial = 1 - mean([pearson(f_s[:, :, y, x].sum(1), f_t[:, :, y, x].sum(1)) for y, x in places]) if several else 1
    return o.temperature**2 * (o.beta * inter + o.gamma * intra) + o.iota * channel + o.kappa * spatial


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 4.0, "beta": 2.0, "kappa": 0.0}, {"beta": 0.0, "gamma": 0.0, "iota": 3.0}, {"gamma": 5.0}], ids=str
)
@pytest.mark.parametrize(
    ("shapes", "count"), [(((3, 4, 4), (5, 4, 4)), 6), (((4, 4, 4), (4, 2, 2)), 3), (((3, 4, 4), (5, 4, 4)), 1)], ids=str
)
def test_is_the_formula(shapes, count, options):
    loss, *given = dist_plus(*shapes, count, **options)
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_map_that_correlates_is_better_than_one_that_does_not(sign):
    """Both parts on maps are 1 - r: 0 at best, 2 at worst."""
    loss, _, teacher, batch = dist_plus((5, 4, 4), (5, 4, 4), beta=0.0, gamma=0.0)
    f_s = sign * 3 * teacher.features["b"] + 7
    value = loss(kdkit.Outputs(teacher.logits, {"a": f_s}), teacher, batch)
    assert value.item() == pytest.approx(0 if sign > 0 else 4, abs=1e-5)


def test_of_one_sample_the_parts_over_samples_are_constant():
    loss, student, teacher, batch = dist_plus(count=1, beta=0.0, iota=0.0)
    learning = student.map(lambda x: x.requires_grad_())
    value = loss(learning, teacher, batch)
    value.backward()
    assert value.item() == 2 and not learning.logits.grad.any() and not learning.features["a"].grad.any()


def test_without_maps_it_is_dist():
    loss, *given = dist_plus(iota=0.0, kappa=0.0, temperature=3.0)
    dist = PLUGINS.losses["dist"]
    torch.testing.assert_close(loss(*given), dist(dist.Options(temperature=3.0))(*given))


def test_keeps_the_promises_when_only_maps_count():
    check_survives_degenerate_inputs(DistPlus, beta=0.0, gamma=0.0)


def test_it_reads_whole_predictions():
    tasks = PLUGINS.tasks
    assert serves(DistPlus.for_tasks(), tasks["classification"]()) and not serves(DistPlus.for_tasks(), tasks["segmentation"]())
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(4, 5\) and teacher logits \(4, 7\)"):
        answers = random_outputs({"a": (3, 4, 4)}, size=4), random_outputs({"b": (3, 4, 4)}, size=4, classes=7)
        DistPlus(DistPlus.Options(layers=PAIR)).setup(*answers)
