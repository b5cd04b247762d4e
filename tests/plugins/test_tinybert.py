import math

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.outputs import of_texts

TinyBert = registry.load().losses["tinybert"]
NAMES = ["embeddings", "layer", "query", "key", "query2", "key2"]


def tinybert(student=(4, 6), teacher=(4, 8), count=5, names=NAMES[:4], attention=1, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    layers = [{"student": name, "teacher": name} for name in names]
    loss = TinyBert(TinyBert.Options(layers=layers, attention=attention, **{"heads": 2, **options}))
    answers = [random_outputs(dict.fromkeys(names, shape), size=count, seed=seed) for seed, shape in enumerate((student, teacher))]
    torch.manual_seed(0)
    loss.setup(*answers)
    return loss, *answers, random_batch(count)


def head(f, n, h, heads):
    width = f.shape[2] // heads
    return f[n, :, h * width : (h + 1) * width]


def formula(loss, student, teacher, batch):
    """Token by token, head by head."""
    o, names, total = loss.options, [pair.student for pair in loss.options.layers], 0
    size, length = student.features[names[0]].shape[:2]
    mask = torch.ones(size, length).bool() if student.mask is None else student.mask
    cut = len(names) - 2 * o.attention
    for name in names[:cut]:
        gaps = [
            ((loss.map.weight @ student.features[name][n, i] + loss.map.bias - teacher.features[name][n, i]) ** 2).mean()
            for n in range(size)
            for i in range(length)
            if mask[n, i]
        ]
        total = total + sum(gaps) / len(gaps)
    for query, key in zip(names[cut::2], names[cut + 1 :: 2], strict=True):
        gaps = []
        for n in range(size):
            for h in range(o.heads):
                ours, theirs = (
                    head(x.features[query], n, h, o.heads)
                    @ head(x.features[key], n, h, o.heads).T
                    / math.sqrt(x.features[key].shape[2] / o.heads)
                    for x in (student, teacher)
                )
                gaps += [(ours[i, j] - theirs[i, j]) ** 2 for i in range(length) for j in range(length) if mask[n, i] and mask[n, j]]
        total = total + sum(gaps) / len(gaps)
    return total


@pytest.mark.parametrize(
    ("names", "attention", "heads"), [(NAMES[:2], 0, 12), (NAMES[:4], 1, 2), (NAMES, 2, 1), (NAMES[2:4], 1, 2)], ids=str
)
@pytest.mark.parametrize("texts", [False, True], ids=["tokens", "texts"])
def test_is_the_formula(names, attention, heads, texts):
    loss, student, teacher, batch = tinybert(names=names, attention=attention, heads=heads)
    if texts:
        student, teacher = of_texts(student, 4), of_texts(teacher, 4)
    assert_agrees(loss, formula, student, teacher, batch)


def test_one_map_serves_all_hidden_states():
    loss, *_ = tinybert()
    assert {name: tuple(x.shape) for name, x in loss.named_parameters()} == {"map.weight": (8, 6), "map.bias": (8,)}
    assert not [*tinybert(names=NAMES[2:4])[0].parameters()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": 3}, "3 needs 6 pairs of layers"),
        ({"heads": 4}, "widths that 4 divides"),
        ({"student": (9, 6)}, "equally many tokens"),
    ],
    ids=str,
)
def test_refuses(options, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        tinybert(**options)


@pytest.mark.parametrize(
    ("shapes", "attention", "says"),
    [({"a": (4, 6), "b": (4, 8)}, 0, "widths are 6 to 6, 8 to 8"), ({"a": (4, 6), "b": (9, 6)}, 1, "must have one shape")],
)
def test_refuses_layers_that_do_not_fit_each_other(shapes, attention, says):
    layers = [{"student": name, "teacher": name} for name in shapes]
    with pytest.raises(kdkit.ShapeError, match=says):
        TinyBert(TinyBert.Options(layers=layers, attention=attention, heads=2)).setup(
            random_outputs(shapes), random_outputs(shapes, seed=1)
        )


@pytest.mark.slow
def test_a_recipe_of_texts_learns_by_the_three_losses_on_transformers(tmp_path):
    """Hidden states, attention scores of the network's own queries and keys, first tokens, relations."""
    from small_texts import BERT, LAYER, lay_out, recipe, write

    folder = lay_out(tmp_path)
    pair = lambda name, ours=0, theirs=1: {"student": f"{LAYER}.{ours}{name}", "teacher": f"{LAYER}.{theirs}{name}"}  # noqa: E731
    parts = [pair(f".attention.self.{name}") for name in ("query", "key", "value")]
    losses = [
        {"use": "cross_entropy"},
        {"use": "tinybert", "layers": [pair(""), *parts[:2]], "attention": 1, "heads": 2},
        {"use": "bert_pkd", "layers": [pair("")], "weight": 10},
        {"use": "minilm_relations", "layers": parts, "heads": 4},
    ]
    assert BERT["num_attention_heads"] == 2
    changed = recipe(folder)["data"] | {"train_samples": 32}
    run = kdkit.train(
        write(folder, losses=losses, data=changed, train={"epochs": 1, "optimizer": {"lr": 0.01}}), folder=tmp_path / "run", quiet=True
    )
    assert run.test["nll"] > 0
