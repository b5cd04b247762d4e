import pytest
import torch
from naive_maps import resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

Embedding = registry.load().losses["embedding"]
PAIR = [{"student": "a", "teacher": "b"}]


def embedding(student, teacher, size=3, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = Embedding(Embedding.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    """Position by position."""
    f_s, f_t = student.features["a"], teacher.features["b"]
    if f_s.ndim == 3 and f_t.ndim == 4:  # without the class token
        side = f_t.shape[2] if f_s.shape[1] > f_t.shape[2] ** 2 else int((f_s.shape[1] - 1) ** 0.5)
        f_s = f_s[:, 1:].reshape(len(f_s), side, side, -1).permute(0, 3, 1, 2)
    if f_s.ndim == 4:
        f_s = resized(f_s, f_t.shape[2:]).flatten(2).transpose(1, 2)
        f_t = f_t.flatten(2).transpose(1, 2)
    rows_s, rows_t = f_s.reshape(-1, f_s.shape[-1]), f_t.reshape(-1, f_t.shape[-1])
    errors = []
    for row, wanted in zip(rows_s, rows_t, strict=True):
        guess = row @ loss.projectors[0].weight.T + loss.projectors[0].bias
        if loss.options.distance == "mse":
            errors.append(((guess - wanted) ** 2).mean())
        else:
            errors.append(1 - guess @ wanted / (guess.norm() * wanted.norm()))
    return torch.stack(errors).mean()


SHAPES = {
    "vectors": ((3,), (5,)),
    "tokens": ((5, 3), (5, 4)),
    "maps": ((3, 4, 4), (5, 4, 4)),
    "a larger grid": ((3, 2, 2), (5, 4, 4)),
    "a smaller grid": ((3, 6, 6), (5, 3, 3)),
    "tokens and a map": ((10, 3), (5, 3, 3)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_is_the_formula(distance, shapes):
    loss, *answers = embedding(*shapes, distance=distance)
    assert_agrees(loss, formula, *answers)


def test_a_hidden_layer_makes_the_projector_deeper():
    loss, *answers = embedding((3,), (5,), hidden=7)
    assert [type(part).__name__ for part in loss.projectors[0]] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert loss(*answers).isfinite() and sum(p.numel() for p in loss.parameters()) == 4 * 7 + 2 * 7 + 8 * 5


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_perfect_projector_costs_nothing(distance):
    loss, student, _, batch = embedding((3,), (3,), distance=distance)
    with torch.no_grad():
        loss.projectors[0].weight.copy_(torch.eye(3))
        loss.projectors[0].bias.zero_()
    assert loss(student, kdkit.Outputs(student.logits, {"b": student.features["a"]}), batch).item() == pytest.approx(0, abs=1e-6)
