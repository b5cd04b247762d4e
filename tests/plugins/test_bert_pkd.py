import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.outputs import of_texts

PKD = registry.load().losses["bert_pkd"]
LAYERS = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]


def pkd(student=(4, 6), teacher=(4, 10), count=5, layers=LAYERS[:1]):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = PKD(PKD.Options(layers=layers))
    f_s = random_outputs({layer["student"]: student for layer in layers}, size=count)
    f_t = random_outputs({layer["teacher"]: teacher for layer in layers}, size=count, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(count)


def formula(loss, student, teacher, batch):
    """Text by text."""
    total = 0
    for adapter, pair in zip(loss.adapters, loss.options.layers, strict=True):
        h_s, h_t = student.features[pair.student], teacher.features[pair.teacher]
        for s, t in zip(h_s, h_t, strict=True):
            s, t = (s, t) if s.ndim == 1 else (s[0], t[0])
            if not isinstance(adapter, torch.nn.Identity):
                s = adapter.weight @ s + adapter.bias
            total = total + ((s / s.norm() - t / t.norm()) ** 2).sum()
    return total / len(h_s) / len(loss.adapters)


@pytest.mark.parametrize(("student", "teacher"), [((4, 6), (4, 10)), ((3, 6), (7, 6)), ((6,), (10,))], ids=str)
@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS], ids=["one pair", "two pairs"])
def test_is_the_formula(student, teacher, layers):
    loss, *given = pkd(student, teacher, layers=layers)
    assert_agrees(loss, formula, *given)


def test_texts_of_unequal_lengths_have_a_first_token():
    loss, student, teacher, batch = pkd()
    assert_agrees(loss, formula, of_texts(student, 4), of_texts(teacher, 4), batch)


@pytest.mark.parametrize(("turn", "wanted"), [(1, 0), (0, 2), (-1, 4)])
def test_is_twice_how_far_the_cosine_is_from_one(turn, wanted):
    loss, *_ = pkd((2, 2), (2, 2))
    h_s = torch.tensor([[[3.0 * turn, 3.0 * (1 - abs(turn))], [5.0, 5.0]]])
    h_t = torch.tensor([[[0.5, 0.0], [-1.0, 0.0]]])
    value = loss(kdkit.Outputs(h_s[:, 0], {"a": h_s}), kdkit.Outputs(h_t[:, 0], {"b": h_t}), random_batch(1))
    assert value.item() == pytest.approx(wanted)


@pytest.mark.parametrize("shapes", [((4, 6), (10,)), ((3, 4, 4), (5, 4, 4))], ids=str)
def test_refuses_what_has_no_first_token(shapes):
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' .* with a first token"):
        pkd(*shapes)
