import inspect

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.outputs import of_texts

TokenKL = registry.load().losses["token_kl"]
PAIR = [{"student": "a", "teacher": "b"}]


def token_kl(student=(4, 3), teacher=(4, 5), count=3, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = TokenKL(TokenKL.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def tokens(f):
    return f if f.ndim == 3 else f.flatten(2).transpose(1, 2)


def shares(rows, i, temperature):
    unit = [row / (row @ row).sqrt() for row in rows]
    row = torch.stack([unit[i] @ other / temperature for other in unit]).exp()
    return row / row.sum()


def formula(loss, student, teacher, batch):
    """Token by token."""
    (head,), found = loss.heads, []
    f_s, f_t = student.features["a"], teacher.features["b"]
    if f_t.ndim == 4:
        f_s = torch.nn.functional.interpolate(f_s, f_t.shape[2:], mode="bilinear", align_corners=False)
    for n, (s, t) in enumerate(zip(tokens(f_s), tokens(f_t), strict=True)):
        real = slice(None) if student.mask is None else student.mask[n]
        s, t = s[real] @ head.weight.T + head.bias, t[real]
        for i in range(len(s)):
            p, q = shares(s, i, loss.options.temperature), shares(t, i, loss.options.temperature)
            found.append((q * (q / p).log()).sum())
    return sum(found) / len(found)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((3, 2, 2), (5, 3, 3)), ((3, 3, 3), (9, 5))], ids=str)
def test_is_the_formula(shapes, options):
    loss, *given = token_kl(*shapes, **options)
    assert_agrees(loss, formula, *given)


def test_padding_does_not_count():
    loss, student, teacher, batch = token_kl(count=6)
    assert_agrees(loss, formula, of_texts(student, 4), of_texts(teacher, 4), batch)


def test_chunks_change_nothing(monkeypatch):
    loss, student, teacher, batch = token_kl(count=5)

    def found():
        f = student.features["a"].clone().requires_grad_()
        value = loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
        return value, *torch.autograd.grad(value, f)

    whole = found()
    monkeypatch.setattr(inspect.getmodule(TokenKL), "MOST_SIMILARITIES", 40)
    torch.testing.assert_close(found(), whole)


def test_a_student_of_equal_tokens_sees_all_alike():
    """Two tokens at right angles to the teacher, the same to the student: q is softmax([1, 0]), p is 1/2."""
    loss, student, _, batch = token_kl((2, 3), (2, 2), temperature=1.0)
    f_t = torch.eye(2).expand(3, 2, 2)
    value = loss(student.map(torch.ones_like), kdkit.Outputs(student.logits, {"b": f_t}), batch)
    q = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(value, (q * (q / 0.5).log()).sum())


@pytest.mark.parametrize(("student", "teacher"), [((3,), (5,)), ((3, 4, 4), (5, 1, 1)), ((1, 3), (1, 5))], ids=str)
def test_refuses_what_has_no_tokens(student, teacher):
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' .* no two tokens"):
        token_kl(student, teacher)
