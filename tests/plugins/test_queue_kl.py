import copy

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

QueueKL = registry.load().losses["queue_kl"]
PAIR = [{"student": "a", "teacher": "b"}]


def queue_kl(student=(6,), teacher=(10,), count=4, queue=10, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = QueueKL(QueueKL.Options(layers=PAIR, queue=queue, **options))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def unit(f):
    return f / f.square().sum(-1, keepdim=True).sqrt()


def pooled(f):
    return f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))


def formula(loss, student, teacher, batch):
    """Image by image, over those rows that something was written to, the batch's own included."""
    (part,), total = loss.parts, 0
    e_t = unit(pooled(teacher.features["b"]))
    rows = [*part.queue.rows]
    for i, row in enumerate(e_t):
        rows[(int(part.queue.place) + i) % len(rows)] = row
    rows = [row for row in rows if row.any()]
    for s, t in zip(unit(pooled(student.features["a"]) @ part.head.weight.T + part.head.bias), e_t, strict=True):
        p, q = (torch.stack([(e @ row) / loss.options.temperature for row in rows]).exp() for e in (s, t))
        p, q = p / p.sum(), q / q.sum()
        total = total + sum(q[k] * (q[k] / p[k]).log() for k in range(len(rows)))
    return total / len(e_t)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}], ids=str)
@pytest.mark.parametrize("shapes", [((6,), (10,)), ((6, 4, 4), (9, 10))], ids=str)
def test_is_the_formula(shapes, options, steps):
    loss, *given = queue_kl(*shapes, **options)
    for _ in range(steps):
        loss(*given)
    assert_agrees(loss, formula, *given)
    assert_agrees(loss.eval(), formula, *given)


def test_the_student_that_gives_the_teachers_embeddings_has_no_loss():
    loss, _, teacher, batch = queue_kl((10,), (10,))
    with torch.no_grad():
        loss.parts[0].head.weight.copy_(3 * torch.eye(10))
        loss.parts[0].head.bias.zero_()
    value = loss(kdkit.Outputs(teacher.logits, {"a": teacher.features["b"]}), teacher, batch)
    assert value.item() == pytest.approx(0, abs=1e-6)


def test_an_empty_queue_has_nothing_but_the_batch():
    """Two images, two rows: with the teacher's embeddings at right angles, q is softmax([1, 0] / T)."""
    loss, *_ = queue_kl((2,), (2,), temperature=1.0)
    with torch.no_grad():
        loss.parts[0].head.weight.copy_(torch.eye(2))
        loss.parts[0].head.bias.zero_()
    student, teacher = torch.ones(2, 2), torch.eye(2)
    value = loss(kdkit.Outputs(student, {"a": student}), kdkit.Outputs(teacher, {"b": teacher}), random_batch(2))
    q = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(value, (q * (q / 0.5).log()).sum())


def test_a_teacher_of_zeros_teaches_nothing():
    loss, student, teacher, batch = queue_kl()
    f = student.features["a"].requires_grad_()
    value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.zeros_like), batch)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and not f.grad.any()


def test_in_eval_mode_nothing_is_remembered():
    loss, *given = queue_kl()
    before = copy.deepcopy(loss.state_dict())
    value = loss.eval()(*given)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    torch.testing.assert_close(loss.train()(*given), value)
    assert loss.parts[0].queue.place == 4
