import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import (
    assert_agrees,
    check_ignores_padding,
    check_reads_every_layer,
    check_survives_degenerate_inputs,
    random_batch,
    random_outputs,
)
from kdkit.testing.outputs import of_texts

CKA = registry.load().losses["cka"]
PAIR = [{"student": "a", "teacher": "b"}]


def answers(student, teacher, count):
    return random_outputs({"a": student}, size=count), random_outputs({"b": teacher}, size=count, seed=1), random_batch(count)


def hsic(k, m):
    """The Hilbert-Schmidt independence criterion of two Gram matrices, which are centred by a matrix H."""
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - torch.ones(n, n, dtype=k.dtype) / n
    return (k @ h @ m @ h).trace() / (n - 1) ** 2


def alignment(x, y, centre):
    if len(x) < 2:
        return 1 + 0 * x.sum()
    k, m = (torch.stack([torch.stack([a @ b for b in e]) for a in e]) for e in (x, y))
    if not centre:
        return (k * m).sum() / ((k**2).sum() * (m**2).sum()).sqrt()
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def tokens(f):
    return f if f.ndim == 3 else f.flatten(2).transpose(1, 2)


def formula(loss, student, teacher, batch):
    f_s, f_t, o = student.features["a"], teacher.features["b"], loss.options
    if not o.patches:
        return 1 - alignment(f_s.flatten(1), f_t.flatten(1), o.centre)
    found = []
    for i, (x, y) in enumerate(zip(tokens(f_s), tokens(f_t), strict=True)):
        real = slice(None) if student.mask is None else student.mask[i]
        found.append(1 - alignment(x[real], y[real], o.centre))
    return sum(found) / len(found)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shapes", [((3,), (5,)), ((30,), (2,)), ((3, 2, 2), (4, 3, 3)), ((4, 3), (2, 5))], ids=str)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_is_the_formula(count, shapes, centre):
    assert_agrees(CKA(CKA.Options(layers=PAIR, centre=centre)), formula, *answers(*shapes, count))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((9, 2), (5, 3, 3)), ((1, 3), (1, 5))], ids=str)
def test_is_the_formula_over_the_tokens_of_an_image(shapes, centre):
    assert_agrees(CKA(CKA.Options(layers=PAIR, centre=centre, patches=True)), formula, *answers(*shapes, 3))


def test_padding_does_not_count():
    student, teacher, batch = answers((4, 3), (4, 5), 5)
    assert_agrees(CKA(CKA.Options(layers=PAIR, patches=True)), formula, of_texts(student, 4), of_texts(teacher, 4), batch)


def test_neither_scale_nor_turns_nor_shifts_matter():
    student, teacher, batch = answers((6,), (6,), 8)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    alike = kdkit.Outputs(teacher.logits, {"b": 5 * student.features["a"] @ turn + 2})
    assert CKA(CKA.Options(layers=PAIR))(student, alike, batch).item() == pytest.approx(0, abs=1e-6)


def test_embeddings_that_vary_along_other_samples_are_not_aligned():
    """The one varies between samples 1 and 2, the other between 3 and 4."""
    f_s, f_t = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0.0], [2.0], [-2.0]])
    value = CKA(CKA.Options(layers=PAIR))(kdkit.Outputs(f_s, {"a": f_s}), kdkit.Outputs(f_t, {"b": f_t}), random_batch(4))
    assert value.item() == pytest.approx(1)


@pytest.mark.parametrize(("shape", "options"), [((3,), {}), ((3,), {"centre": False}), ((1, 3), {"patches": True})])
def test_one_row_gives_exactly_nothing(shape, options):
    student, teacher, batch = answers(shape, shape, 1)
    f = student.features["a"].requires_grad_()
    value = CKA(CKA.Options(layers=PAIR, **options))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch)
    value.backward()
    assert value.item() == 0 and not f.grad.any()


@pytest.mark.parametrize("scale", [0, 1e-12, 1e-7, 2e-6, 1e-4, 6e4])
def test_gradients_are_bounded_at_every_scale(scale):
    student, teacher, batch = answers((3,), (5,), 4)
    f = (scale * student.features["a"]).requires_grad_()
    CKA(CKA.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


@pytest.mark.parametrize("check", [check_survives_degenerate_inputs, check_ignores_padding, check_reads_every_layer])
def test_keeps_the_promises_over_tokens(check):
    check(CKA, patches=True)


def test_tokens_must_be_equally_many():
    student, teacher, _ = answers((9, 3), (4, 5), 2)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(2, 9, 3\) and teacher 'b' \(2, 4, 5\)"):
        CKA(CKA.Options(layers=PAIR, patches=True)).setup(student, teacher)
