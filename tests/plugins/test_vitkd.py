import pytest
import torch
import torch.nn.functional as F

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

ViTKD = registry.load().losses["vitkd"]
PAIRS = {
    "tokens": [((9, 3), (9, 5)), ((9, 3), (9, 5)), ((9, 3), (9, 5))],
    "same width": [((9, 3), (9, 3)), ((9, 3), (9, 3))],
    "a class token": [((10, 3), (10, 5)), ((10, 3), (10, 5))],
    "maps": [((3, 4, 4), (16, 5)), ((3, 2, 4), (5, 2, 4))],
}


def vitkd(pairs, size=4, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    layers = [{"student": f"s{i}", "teacher": f"t{i}"} for i in range(len(pairs))]
    loss = ViTKD(ViTKD.Options(layers=layers, **options))
    s = random_outputs({f"s{i}": pair[0] for i, pair in enumerate(pairs)}, size=size)
    t = random_outputs({f"t{i}": pair[1] for i, pair in enumerate(pairs)}, size=size, seed=1)
    loss.setup(s, t)
    torch.nn.init.normal_(loss.hidden, generator=torch.Generator().manual_seed(3))
    return loss, s, t, random_batch(size)


class Seeded(ViTKD):
    """Hides the tokens that the formula hides."""

    def forward(self, student, teacher, batch):
        torch.manual_seed(7)
        return super().forward(student, teacher, batch)


def tokens(f):
    return f if f.ndim == 3 else f.flatten(2).transpose(1, 2)


def formula(loss, student, teacher, batch):
    size, last, total = len(batch.labels), len(loss.options.layers) - 1, 0
    for i in range(last + 1):
        f_s, f_t, align = student.features[f"s{i}"], teacher.features[f"t{i}"], loss.aligns[i]
        grid = f_t.shape[2:] if f_t.ndim == 4 else (3, 3)
        f_s, f_t = tokens(f_s), tokens(f_t)
        if isinstance(align, torch.nn.Linear):
            f_s = f_s @ align.weight.T + align.bias
        if i < last:
            total = total + loss.options.mimic * ((f_s - f_t) ** 2).sum()
            continue
        count = grid[0] * grid[1]
        f_s, f_t = f_s[:, f_s.shape[1] - count :], f_t[:, f_t.shape[1] - count :]
        torch.manual_seed(7)
        noise = torch.rand(size, count)
        kept = int(count * (1 - loss.options.ratio))
        first, _, second = loss.generator
        for n in range(size):
            shown = set(noise[n].argsort()[:kept].tolist())
            x = torch.stack([f_s[n, k] if k in shown else loss.hidden[0, :, 0, 0] for k in range(count)])
            x = F.conv2d(x.T.reshape(1, -1, *grid), first.weight, first.bias, padding=1).clamp_min(0)
            x = F.conv2d(x, second.weight, second.bias, padding=1)[0].flatten(1).T
            error = sum(((x[k] - f_t[n, k]) ** 2).sum() for k in range(count) if k not in shown)
            total = total + loss.options.generation / loss.options.ratio * error
    return total / size


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, pairs):
    loss, *given = vitkd(pairs, size)
    loss.__class__ = Seeded
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("options", [{"mimic": 0, "generation": 2}, {"ratio": 0.25}, {"ratio": 0.8}])
def test_is_the_formula_with_other_options(options):
    loss, *given = vitkd(PAIRS["tokens"], 64, **options)
    loss.__class__ = Seeded
    assert_agrees(loss, formula, *given)


@pytest.mark.parametrize("name", ["same width", "a class token", "maps"])
def test_gradient(name):
    loss, student, teacher, batch = vitkd(PAIRS[name], 2)
    loss.__class__ = Seeded
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    features = tuple(f.double().requires_grad_() for f in student.features.values())
    value = lambda *f: loss(kdkit.Outputs(student.logits, dict(zip(student.features, f, strict=True))), teacher, batch)  # noqa: E731
    assert torch.autograd.gradcheck(value, features)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 5), (0.25, 3), (0.99, 8), (0.01, 1)])
def test_as_many_tokens_are_hidden_in_every_sample(ratio, hidden):
    loss, student, teacher, batch = vitkd(PAIRS["same width"], 16, ratio=ratio)
    seen = []
    loss.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss(student, teacher, batch)
    masked = (seen[0] == loss.hidden).all(1).flatten(1)
    assert masked.sum(1).tolist() == [hidden] * 16 and len(masked.unique(dim=0)) > 3


def test_keeps_the_promises_with_other_options():
    layers = [{"student": name, "teacher": name} for name in "abc"]
    check_loss(ViTKD, layers=layers, ratio=0.7, generation=1.0)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (PAIRS["tokens"][:1], r"one pair of layers, student \(4, 9, 3\) and teacher \(4, 9, 5\), is too few"),
        ([*PAIRS["tokens"][:1], ((15, 3), (15, 5))], r"student 's1' \(4, 15, 3\) and teacher 't1' \(4, 15, 5\) must be tokens .* square"),
        ([*PAIRS["tokens"][:1], ((3, 1, 1), (5, 1, 1))], r"the last layers' grids, student \(4, 3, 1, 1\) .* have several positions"),
        ([((9, 3), (5,)), *PAIRS["tokens"][:1]], "student 's0' .*teacher 't0' .*equally many tokens"),
        ([*PAIRS["tokens"][:1], ((3, 2, 8), (16, 5))], r"the last layers' grids, student \(4, 3, 2, 8\) and teacher \(4, 5, 4, 4\)"),
    ],
)
def test_refuses(pairs, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        vitkd(pairs)
