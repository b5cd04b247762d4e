import copy

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

Seed = registry.load().losses["seed"]
PAIR = [{"student": "a", "teacher": "b"}]


def seed(student=(6,), teacher=(10,), size=4, queue=16, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = Seed(Seed.Options(layers=PAIR, queue=queue, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def unit(f):
    return f / f.square().sum(-1, keepdim=True).sqrt()


def pooled(f):
    return f if f.ndim == 2 else f.mean(1) if f.ndim == 3 else f.mean((2, 3))


def formula(loss, student, teacher, batch):
    """Image by image, column by column."""
    f_s, f_t = pooled(student.features["a"]), unit(pooled(teacher.features["b"]))
    head, queue, total = loss.heads[0], loss.memories[0].rows, 0
    for i in range(len(f_s)):
        e_s = unit(head(f_s[i]))
        columns = [f_t[i], *queue]
        z_s = torch.stack([e_s @ column for column in columns]) / loss.options.temperature
        z_t = torch.stack([f_t[i] @ column for column in columns]) / loss.options.teacher_temperature
        p = (z_t - z_t.max()).exp() / (z_t - z_t.max()).exp().sum()
        total = total - (p * (z_s - z_s.logsumexp(0))).sum()
    return total / len(f_s)


@pytest.mark.parametrize(
    "options", [{}, {"teacher_temperature": 0.5}, {"head": "linear", "temperature": 1.0, "teacher_temperature": 0.1}], ids=str
)
@pytest.mark.parametrize("shapes", [((6,), (10,)), ((6, 4, 4), (9, 10))], ids=str)
def test_is_the_formula(shapes, options):
    assert_agrees(seed(*shapes, **options)[0].eval(), formula, *seed(*shapes, **options)[1:])


def test_gradient_is_that_of_the_queue_before_the_step():
    loss, student, teacher, batch = seed(teacher_temperature=0.3)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    reference = copy.deepcopy(loss).eval()
    loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()  # the queue has changed since
    again = f.detach().clone().requires_grad_()
    formula(reference, kdkit.Outputs(student.logits, {"a": again}), teacher, batch).backward()
    torch.testing.assert_close(f.grad, again.grad)
    assert loss.heads[0][2].weight.grad.abs().sum() > 0


def test_the_queue_keeps_the_last_embeddings_and_goes_round():
    loss, student, teacher, batch = seed(queue=6)
    first = loss.memories[0].rows.clone()
    wanted = unit(teacher.features["b"])
    loss(student, teacher, batch)
    torch.testing.assert_close(loss.memories[0].rows, torch.cat([wanted, first[4:]]))
    loss(student, teacher.map(lambda x: -x), batch)
    torch.testing.assert_close(loss.memories[0].rows, torch.cat([-wanted[2:], wanted[2:4], -wanted[:2]]))
    assert loss.memories[0].place == 2


def test_a_queue_smaller_than_the_batch_keeps_its_last_ones():
    loss, student, teacher, batch = seed(queue=3)
    loss(student, teacher, batch)
    torch.testing.assert_close(loss.memories[0].rows, unit(teacher.features["b"])[1:])


def test_in_eval_mode_nothing_is_remembered_and_the_state_is_all_there_is():
    loss, student, teacher, batch = seed()
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(student, teacher, batch)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.train()(student, teacher, batch)
    other = seed()[0]
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(student, teacher, batch), loss(student, teacher, batch))
    assert torch.equal(other.memories[0].rows, loss.memories[0].rows)
