import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.outputs import of_texts

MiniLM = registry.load().losses["minilm_relations"]
LAYERS = [{"student": name, "teacher": name} for name in ("query", "key", "value")]


def minilm(student=(4, 6), teacher=(4, 8), count=3, layers=LAYERS, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = MiniLM(MiniLM.Options(layers=layers, **{"heads": 2, **options}))
    names = [layer["student"] for layer in layers]
    answers = [random_outputs(dict.fromkeys(names, shape), size=count, seed=seed) for seed, shape in enumerate((student, teacher))]
    loss.setup(*answers)
    return loss, *answers, random_batch(count)


def relation(a, b, row, columns):
    z = torch.stack([a[row] @ b[column] / math.sqrt(a.shape[1]) for column in columns]).exp()
    return z / z.sum()


def matrices(answer, fused):
    found = []
    for f in answer.features.values():
        width = f.shape[2] // 3 if fused else f.shape[2]
        found += [f[:, :, start : start + width] for start in range(0, f.shape[2], width)]
    return found


def formula(loss, student, teacher, batch):
    """Head by head, token by token."""
    o, total = loss.options, 0
    ours, theirs = matrices(student, o.fused), matrices(teacher, o.fused)
    for a, b in o.relations or [(i, i) for i in range(len(ours))]:
        for n in range(len(batch.labels)):
            real = range(ours[0].shape[1]) if student.mask is None else [i for i, is_real in enumerate(student.mask[n]) if is_real]
            for h in range(o.heads):
                parts = []
                for one in (ours[a], ours[b], theirs[a], theirs[b]):
                    width = one.shape[2] // o.heads
                    parts.append(one[n, :, h * width : (h + 1) * width])
                for i in real:
                    p, q = relation(*parts[:2], i, real), relation(*parts[2:], i, real)
                    total = total + (q * (q / p).log()).sum() / (o.heads * len(real) * len(batch.labels))
    return total


@pytest.mark.parametrize("options", [{}, {"heads": 1}, {"relations": [[0, 1], [2, 2]]}, {"relations": [[1, 0]]}], ids=str)
def test_is_the_formula(options):
    loss, *given = minilm(**options)
    assert_agrees(loss, formula, *given)


def test_padding_is_neither_related_nor_related_to():
    loss, student, teacher, batch = minilm(count=6)
    assert_agrees(loss, formula, of_texts(student, 4), of_texts(teacher, 4), batch)


@pytest.mark.parametrize("options", [{}, {"relations": [[0, 1], [2, 2]]}], ids=str)
def test_one_layer_may_give_all_three(options):
    loss, *given = minilm((4, 12), (4, 18), layers=LAYERS[:1], fused=True, **options)
    assert len(loss.options.matrices(*given[:2])) == 3
    assert_agrees(loss, formula, *given)


def test_equal_relations_cost_nothing_whatever_the_width():
    """A teacher of twice the width, each number of a head divided by the fourth root of 2 and written twice."""
    loss, student, _, batch = minilm()
    wide = student.map(lambda x: x.unflatten(-1, (2, -1)).repeat(1, 1, 1, 2).flatten(2) / 2**0.25 if x.ndim == 3 else x)
    assert loss(student, wide, batch).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 4}, r"widths that 4 divides"),
        ({"heads": 2, "fused": True, "teacher": (4, 10)}, r"widths that 3 x 2 divides"),
        ({"relations": [[0, 3]]}, r"there is no layer 3 in \[0, 3\]; numbers go from 0 to 2"),
        ({"student": (9, 6)}, r"equally many tokens"),
    ],
    ids=str,
)
def test_refuses(options, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        minilm(**options)


def test_refuses_to_relate_layers_of_unequally_many_tokens():
    student, teacher = (random_outputs({"a": (4, 6), "b": (9, 6)}, seed=seed) for seed in (0, 1))
    layers = [{"student": name, "teacher": name} for name in "ab"]
    MiniLM(MiniLM.Options(layers=layers, heads=2)).setup(student, teacher)
    with pytest.raises(kdkit.ShapeError, match="layers 0 and 1 have unequally many tokens"):
        MiniLM(MiniLM.Options(layers=layers, heads=2, relations=[[0, 1]])).setup(student, teacher)
