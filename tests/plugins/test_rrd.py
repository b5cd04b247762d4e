import copy

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

RRD = registry.load().losses["rrd"]
PAIR = [{"student": "a", "teacher": "b"}]


def rrd(student=(6,), teacher=(10,), count=4, queue=16, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = RRD(RRD.Options(layers=PAIR, queue=queue, **{"size": 8, **options}))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def unit(f):
    return f / f.square().sum(-1, keepdim=True).sqrt()


def pooled(f):
    return f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))


def embedding(head, f):
    return unit(pooled(f) @ head.weight.T + head.bias)


def written(queue, place, new):
    """The rows after one after another has been written."""
    rows = [*queue]
    for i, row in enumerate(new):
        rows[(place + i) % len(rows)] = row
    return rows


def formula(loss, student, teacher, batch):
    """Image by image, row by row; the batch is in the queue already."""
    (part,), total = loss.parts, 0
    embeddings = embedding(part.teacher, teacher.features["b"]).detach()
    rows = written(part.queue.rows, int(part.queue.place), embeddings)
    for e_s, e_t in zip(embedding(part.student, student.features["a"]), embeddings, strict=True):
        z_s = torch.stack([e_s @ row for row in rows]) / loss.options.temperature
        z_t = torch.stack([e_t @ row for row in rows]) / loss.options.teacher_temperature
        total = total - (z_t.softmax(0) * (z_s - z_s.logsumexp(0))).sum()
    return total / len(embeddings)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "teacher_temperature": 0.3}, {"queue": 6, "size": 3}], ids=str)
@pytest.mark.parametrize("shapes", [((6,), (10,)), ((6, 4, 4), (9, 10))], ids=str)
def test_is_the_formula(shapes, options):
    loss, *given = rrd(*shapes, **options)
    assert_agrees(loss, formula, *given)
    assert_agrees(loss.eval(), formula, *given)


def test_is_the_formula_after_some_steps():
    loss, *given = rrd(queue=6)
    for _ in range(2):
        loss(*given)
    assert loss.parts[0].queue.place == 2
    assert_agrees(loss, formula, *given)


def test_one_step_may_write_twice_before_its_backward():
    """As where a student has two teachers."""
    loss, student, teacher, batch = rrd()
    loss, student, teacher = loss.double(), student.map(torch.Tensor.double), teacher.map(torch.Tensor.double)
    reference = copy.deepcopy(loss).eval()
    f = student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    loss(student, teacher.map(torch.neg), batch)
    (slope,) = torch.autograd.grad(value, f)
    (wanted,) = torch.autograd.grad(formula(reference, kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)
    torch.testing.assert_close(slope, wanted)


def test_the_queue_begins_with_unit_rows_and_keeps_the_last_embeddings():
    loss, student, teacher, batch = rrd(count=7, queue=5)
    queue = loss.parts[0].queue
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(5))
    loss(student, teacher, batch)
    torch.testing.assert_close(queue.rows, embedding(loss.parts[0].teacher, teacher.features["b"])[2:])


def test_the_teachers_head_rests_and_eval_mode_leaves_no_trace():
    loss, *given = rrd()
    assert not any(weight.requires_grad for weight in loss.parts[0].teacher.parameters())
    before = copy.deepcopy(loss.state_dict())
    value = loss.eval()(*given)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    torch.testing.assert_close(loss.train()(*given), value)


def test_a_sharp_teacher_that_sees_itself_only_asks_for_its_own_embedding():
    """At T_t 1e-3 all of its share is on its own row, so the value is a cross-entropy with that row's number."""
    loss, student, teacher, batch = rrd(teacher_temperature=1e-3)
    value = loss(student, teacher, batch)
    (part,) = loss.parts
    logits = embedding(part.student, student.features["a"]) @ part.queue.rows.T / 0.1
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, torch.arange(4)))
