import pytest
import torch
import torch.nn.functional as F

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_adapters_learn, check_teaches_the_student, random_batch, random_outputs

SemCKD = registry.load().losses["semckd"]
LAYERS = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}, {"student": "a", "teacher": "e"}]
STUDENT = {"a": (3, 8, 8), "c": (4, 4, 4)}
TEACHER = {"b": (5, 8, 8), "d": (6, 4, 4), "e": (7, 2, 2)}


def semckd(size=4, student=STUDENT, teacher=TEACHER, layers=LAYERS, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = SemCKD(SemCKD.Options(layers=layers, **{"width": 4, **options}))
    s, t = random_outputs(student, size=size), random_outputs(teacher, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    if x.numel() == x.shape[1]:  # the running ones
        mean, variance = torch.zeros_like(x), torch.ones_like(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def embedded(embed, f):
    first, _, second = embed
    v = f.sum((2, 3)) / f[0, 0].numel()
    v = (v @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias
    return v / (v**2).sum(1, keepdim=True).sqrt()


def formula(loss, student, teacher, batch):
    ours, theirs = [student.features[k] for k in STUDENT], [teacher.features[k] for k in TEACHER]
    total = 0
    for i, f_s in enumerate(ours):
        logits, errors = [], []
        q = embedded(loss.queries[i], f_s)
        for j, f_t in enumerate(theirs):
            logits.append((q * embedded(loss.keys[j], f_t)).sum(1) / loss.options.temperature)
            first, norm1, _, second, norm2, _, third = loss.regressors[i * len(theirs) + j]
            side = min(f_s.shape[2], f_t.shape[2])
            x, t = (F.avg_pool2d(f, f.shape[2] // side) for f in (f_s, f_t))
            x = normalised(F.conv2d(x, first.weight), norm1).clamp_min(0)
            x = normalised(F.conv2d(x, second.weight, padding=1), norm2).clamp_min(0)
            errors.append(((F.conv2d(x, third.weight) - t) ** 2).flatten(1).mean(1))
        for n in range(len(batch.labels)):
            shares = [torch.exp(logit[n]) for logit in logits]
            total = total + sum(share / sum(shares) * error[n] for share, error in zip(shares, errors, strict=True))
    return total / (len(batch.labels) * len(ours))


@pytest.mark.parametrize("temperature", [1, 0.3])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, temperature):
    loss, *given = semckd(size, temperature=temperature)
    assert_agrees(loss, formula, *given)


def test_every_pair_of_layers_has_a_regressor_and_every_layer_an_embedding():
    loss, *_ = semckd()
    assert [(r[0].in_channels, r[6].out_channels) for r in loss.regressors] == [(s, t) for s in (3, 4) for t in (5, 6, 7)]
    assert [e[0].in_features for e in [*loss.queries, *loss.keys]] == [3, 4, 5, 6, 7]


def test_gradient():
    loss, student, teacher, batch = semckd(3, {"a": (3, 2, 2), "c": (2, 1, 1)}, {"b": (2, 2, 2), "d": (3, 1, 1), "e": (2, 4, 4)})
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    a, c = (student.features[name].double().requires_grad_() for name in ("a", "c"))
    assert torch.autograd.gradcheck(lambda a, c: loss(kdkit.Outputs(student.logits, {"a": a, "c": c}), teacher, batch), (a, c))


def test_batches_need_not_be_as_large_as_the_first():
    loss, *_ = semckd(4)
    _, student, teacher, batch = semckd(7)
    assert loss(student, teacher, batch).isfinite()


@pytest.mark.parametrize("check", [check_adapters_learn, check_teaches_the_student])
def test_keeps_its_promises_with_more_layers_on_one_side(check):
    check(SemCKD, layers=[{"student": "a", "teacher": "a"}, {"student": "a", "teacher": "b"}], width=3, temperature=0.5)


@pytest.mark.parametrize(
    ("teacher", "layers", "says"),
    [
        (TEACHER, LAYERS[:1], r"student 'a' \(4, 3, 8, 8\) cannot choose among the single teacher layer 'b' \(4, 5, 8, 8\)"),
        ({**TEACHER, "d": (5,)}, LAYERS, "student 'c' .*teacher 'd' .*must be maps"),
    ],
)
def test_refuses(teacher, layers, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        semckd(teacher=teacher, layers=layers)
