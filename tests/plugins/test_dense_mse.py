import pytest
import torch
import torch.nn.functional as F
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

DENSE = registry.load().losses["dense_mse"]


def dense(student, teacher, pairs="a-b", size=4, **options):
    """The loss, set up, and what it compares; shapes by name, without the batch."""
    torch.manual_seed(0)
    layers = [dict(zip(("student", "teacher"), pair.split("-"), strict=True)) for pair in pairs.split()]
    loss = DENSE(DENSE.Options(layers=layers, **options))
    s, t = random_outputs(student, size=size), random_outputs(teacher, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def at_positions(f, size=None):
    """The vectors of one sample at its positions."""
    if f.ndim == 3:
        f = f if size is None else F.interpolate(f[None], size=size, mode="bilinear", align_corners=False)[0]
        return f.flatten(1).T
    return f if f.ndim == 2 else f[None]


def formula(loss, student, teacher, batch):
    """One sample and one position at a time."""
    total, count = 0, 0
    ours, theirs = ({getattr(pair, side): 0 for pair in loss.options.layers} for side in ("student", "teacher"))
    first = teacher.features[next(iter(theirs))]
    size = first.shape[2:] if first.ndim == 4 else None
    for i in range(len(batch.labels)):
        f_s = torch.cat([at_positions(student.features[name][i], size) for name in ours], 1)
        f_t = torch.cat([at_positions(teacher.features[name][i]) for name in theirs], 1)
        for s, t in zip(f_s, f_t, strict=True):
            if loss.options.hidden:
                one, norm, _, two = loss.projector
                s = one.weight @ s + one.bias
                s = (s - s.mean()) / (s.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
                s = two.weight @ (s * (1 + torch.erf(s / 2**0.5)) / 2) + two.bias
            else:
                s = loss.projector.weight @ s + loss.projector.bias
            total, count = total + ((s - t) ** 2).sum(), count + len(t)
    return total / count


CASES = {
    "tokens": ({"a": (5, 3)}, {"b": (5, 4), "c": (5, 2)}, "a-b a-c"),
    "one pair": ({"a": (5, 3)}, {"b": (5, 4)}, "a-b"),
    "several of both": ({"a": (5, 3), "d": (5, 2)}, {"b": (5, 4), "c": (5, 2)}, "a-b d-c"),
    "maps": ({"a": (3, 3, 5)}, {"b": (4, 2, 4), "c": (2, 2, 4)}, "a-b a-c"),
    "smaller maps": ({"a": (3, 3, 3)}, {"b": (4, 2, 2), "c": (2, 2, 2)}, "a-b a-c"),
    "vectors": ({"a": (3,)}, {"b": (4,), "c": (2,)}, "a-b a-c"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_is_the_formula(size, hidden, case):
    loss, *given = dense(*CASES[case], size=size, hidden=hidden)
    assert_agrees(loss, formula, *given)


def test_the_order_of_the_layers_is_that_of_the_recipe():
    loss, student, teacher, batch = dense(*CASES["tokens"])
    _, f_t = loss.joined(student, teacher)
    assert torch.equal(f_t, torch.cat([teacher.features["b"], teacher.features["c"]], 2))
    assert loss.projector.in_features == 3 and loss.projector.out_features == 6


def test_tokens_with_a_prefix_are_compared_with_a_map_without_it():
    loss, student, teacher, batch = dense({"a": (3, 3, 3)}, {"b": (17, 4), "c": (17, 2)}, "a-b a-c")
    f_s, f_t = loss.joined(student, teacher)
    assert f_s.shape == (4, 4, 4, 3)
    assert torch.equal(f_t[..., :4], teacher.features["b"][:, 1:].unflatten(1, (4, 4)))


def test_nothing_is_normalised():
    """Twice the features have four times the loss, from a projector that gives 0."""
    loss, student, teacher, batch = dense(*CASES["tokens"])
    torch.nn.init.zeros_(loss.projector.weight), torch.nn.init.zeros_(loss.projector.bias)
    value = loss(student, teacher, batch)
    torch.testing.assert_close(loss(student, teacher.map(lambda x: 2 * x), batch), 4 * value)


def test_refuses_layers_of_several_resolutions():
    with pytest.raises(kdkit.ShapeError, match="different positions, 2 x 2 and 4 x 4, .*one resolution"):
        dense({"a": (3, 4, 4)}, {"b": (4, 2, 2), "c": (2, 4, 4)}, "a-b a-c")


def test_keeps_the_promises_with_a_hidden_layer():
    check_but(DENSE, hidden=8)
