import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_adapters_learn, check_teaches_the_student, random_batch, random_outputs

AFD = registry.load().losses["afd"]
LAYERS = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}, {"student": "e", "teacher": "d"}]
STUDENT = {"a": (3, 8, 8), "c": (4, 4, 4), "e": (6, 2, 2)}
TEACHER = {"b": (5, 8, 8), "d": (6, 4, 4)}


def afd(size=4, student=STUDENT, teacher=TEACHER, layers=LAYERS, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    torch.manual_seed(0)
    loss = AFD(AFD.Options(layers=layers, **{"width": 4, **options}))
    s, t = random_outputs(student, size=size), random_outputs(teacher, size=size, seed=1)
    loss.setup(s, t)
    return loss, s, t, random_batch(size)


def normalised(v, part):
    """A linear map and batch normalisation, whose running statistics are 0 and 1."""
    conv, norm = part
    v = v @ conv.weight[:, :, 0, 0].T
    mean, variance = (v.mean(0), v.var(0, correction=0)) if len(v) > 1 else (0, torch.ones_like(v))
    v = (v - mean) / (variance + norm.eps).sqrt()
    return v * norm.weight + norm.bias if norm.affine else v


def attention_map(f, side):
    """(B, positions), by repeating or averaging positions."""
    a = (f**2).sum(1) / f.shape[1]
    if a.shape[1] < side:
        a = a.repeat_interleave(side // a.shape[1], 1).repeat_interleave(side // a.shape[2], 2)
    step = a.shape[1] // side
    a = sum(a[:, i::step, j::step] for i in range(step) for j in range(step)) / step**2
    a = a.flatten(1)
    return a / (a**2).sum(1, keepdim=True).sqrt()


def formula(loss, student, teacher, batch):
    ours, theirs = [student.features[k] for k in STUDENT], [teacher.features[k] for k in TEACHER]
    size, width = len(batch.labels), loss.options.width
    keys = torch.stack([normalised(f.mean((2, 3)), key[0]).clamp_min(0) for f, key in zip(ours, loss.keys, strict=True)], 1)
    turned = normalised(keys.reshape(-1, width), loss.bilinear).reshape(size, len(ours), len(theirs), width)
    total = 0
    for t, f_t in enumerate(theirs):
        query = normalised(f_t.mean((2, 3)), loss.queries[t])
        errors = [((attention_map(f_s, f_t.shape[2]) - attention_map(f_t, f_t.shape[2])) ** 2).sum(1) / f_t.shape[2] ** 2 for f_s in ours]
        for n in range(size):
            shares = [
                torch.exp((turned[n, s, t] @ query[n] + loss.teacher_positions[t] @ loss.student_positions[s]) / width**0.5)
                for s in range(len(ours))
            ]
            total = total + sum(share / sum(shares) * error[n] for share, error in zip(shares, errors, strict=True))
    return total / size


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_is_the_formula(size, width):
    loss, *given = afd(size, width=width)
    assert_agrees(loss, formula, *given)


def test_is_the_formula_on_two_samples():
    """Which normalisation makes +-1 whatever they are, but for its eps: faint ones have a gradient that fp32 can hold."""
    loss, student, teacher, batch = afd(2)
    assert_agrees(loss, formula, *(x.map(lambda value: 0.02 * value) for x in (student, teacher)), batch)


def test_gradient():
    loss, student, teacher, batch = afd(3, {"a": (3, 2, 2), "c": (2, 1, 1), "e": (2, 3, 3)}, {"b": (2, 2, 2), "d": (3, 3, 3)})
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    features = {name: f.double().requires_grad_() for name, f in student.features.items()}
    value = lambda *f: loss(kdkit.Outputs(student.logits, dict(zip(features, f, strict=True))), teacher, batch)  # noqa: E731
    assert torch.autograd.gradcheck(value, tuple(features.values()))


def test_layers_that_look_alike_cost_nothing():
    loss, student, teacher, batch = afd(4, dict.fromkeys(STUDENT, (3, 8, 8)), {"b": (3, 8, 8), "d": (3, 8, 8)})
    same = {name: student.features["a"] for name in STUDENT}
    assert loss(kdkit.Outputs(student.logits, same), kdkit.Outputs(teacher.logits, {"b": same["a"], "d": -2 * same["a"]}), batch) == 0


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-4])
def test_faint_activations_have_bounded_gradients(scale):
    loss, student, teacher, batch = afd()
    faint = student.map(lambda x: (scale * x).requires_grad_())
    loss(faint, teacher, batch).backward()
    assert all(f.grad.isfinite().all() and f.grad.abs().max() < 1e6 for f in faint.features.values())


@pytest.mark.parametrize("check", [check_adapters_learn, check_teaches_the_student])
def test_keeps_its_promises_with_more_layers_on_one_side(check):
    check(AFD, layers=[{"student": "a", "teacher": "a"}, {"student": "b", "teacher": "a"}], width=3)


@pytest.mark.parametrize(
    ("teacher", "layers", "says"),
    [
        (TEACHER, LAYERS[:1], r"'a' \(4, 3, 8, 8\), 'b' \(4, 5, 8, 8\): a single student layer leaves no choice"),
        ({**TEACHER, "d": (6, 1, 1)}, LAYERS, r"'d' \(4, 6, 1, 1\): teacher layers must have several positions"),
        ({**TEACHER, "d": (6,)}, LAYERS, "student 'c' .*teacher 'd' .*must be maps"),
    ],
)
def test_refuses(teacher, layers, says):
    with pytest.raises(kdkit.ShapeError, match=says):
        afd(teacher=teacher, layers=layers)
