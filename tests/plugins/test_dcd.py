import math

import pytest
import torch
from pydantic import ValidationError

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

DCD = registry.load().losses["dcd"]
PAIR = [{"student": "a", "teacher": "b"}]


def dcd(student=(6,), teacher=(10,), count=5, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = DCD(DCD.Options(layers=PAIR, **{"size": 8, **options}))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def embeddings(head, f):
    f = f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))
    return [row / (row @ row).sqrt() for row in f @ head.weight.T + head.bias]


def formula(loss, student, teacher, batch):
    """Pair by pair: each image's student against all teachers, its teacher against all students."""
    (part,), total = loss.parts, 0
    scale = min(part.tau.exp(), torch.tensor(10.0))
    e_s, e_t = embeddings(part.student, student.features["a"]), embeddings(part.teacher, teacher.features["b"])
    for i in range(len(e_s)):
        p = torch.stack([scale * (e_s[i] @ t) for t in e_t]).exp()
        q = torch.stack([scale * (s @ e_t[i]) for s in e_s]).exp()
        p, q = p / p.sum(), q / q.sum()
        total = total - p[i].log() + loss.options.alpha * (q * (q.log() - p.log())).sum()
    return total / len(e_s)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"alpha": 3.0, "tau": 2.0, "size": 3}, {"learn": False, "tau": -1.0}], ids=str)
@pytest.mark.parametrize(("shapes", "count"), [(((6,), (10,)), 5), (((6, 4, 4), (9, 10)), 2), (((6,), (10,)), 16)], ids=str)
def test_is_the_formula(shapes, count, options):
    loss, *given = dcd(*shapes, count, **options)
    assert_agrees(loss, formula, *given)


def test_one_sample_gives_exactly_nothing():
    loss, student, teacher, batch = dcd(count=1)
    f = student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


def test_the_scale_is_learnt_up_to_ten():
    loss, *given = dcd()
    loss(*given).backward()
    assert loss.parts[0].tau.grad != 0
    loss.zero_grad()
    with torch.no_grad():
        loss.parts[0].tau.fill_(3.0)
    value = loss(*given)
    value.backward()
    assert loss.parts[0].tau.grad == 0
    with torch.no_grad():
        loss.parts[0].tau.fill_(math.log(10))
    torch.testing.assert_close(loss(*given), value)
    assert not dcd(learn=False)[0].parts[0].tau.requires_grad


def test_a_start_that_could_not_be_learnt_is_refused():
    with pytest.raises(ValidationError, match="tau"):
        DCD.Options(tau=2.4)


def test_both_heads_learn():
    loss, *given = dcd()
    loss(*given).backward()
    assert all(weight.grad.any() for weight in loss.parameters())
