import json

import pytest
import torch
import torch.nn.functional as F
from training import train

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

HSAKD = registry.load().losses["hsakd"]
TURNED = {"turned": 3}
PAIRS = [{"student": "one", "teacher": "one"}, {"student": "two", "teacher": "two"}]
STUDENT, TEACHER = {"one": (3, 8, 8), "two": (6, 2, 2)}, {"one": (4, 4, 4), "two": (5, 4, 4)}


def hsakd(student=STUDENT, teacher=TEACHER, layers=PAIRS, count=3, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = HSAKD(HSAKD.Options(layers=layers, **options))
    answers = [random_outputs(shapes, size=count, seed=seed, views=TURNED) for seed, shapes in enumerate((student, teacher))]
    torch.manual_seed(0)
    loss.setup(*answers)
    return loss, *answers, random_batch(count)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def answer(branch, f, strides):
    """Convolutions of these strides, the mean over positions, a linear layer."""
    for i, stride in enumerate(strides):
        f = normalised(F.conv2d(f, branch[3 * i].weight, stride=stride, padding=1), branch[3 * i + 1]).clamp_min(0)
    return f.flatten(2).mean(2) @ branch[-1].weight.T + branch[-1].bias


def softened(z, temperature):
    z = (z / temperature).exp()
    return z / z.sum()


def divergence(s, t, temperature):
    total = 0
    for one, other in zip(s, t, strict=True):
        p, q = softened(one, temperature), softened(other, temperature)
        total = total + (q * (q / p).log()).sum()
    return temperature**2 * total / len(s)


STRIDES = {"student": {"one": (2, 2, 1), "two": (1,)}, "teacher": {"one": (1,), "two": (1,)}}


def formula(loss, student, teacher, batch):
    """Image by image; angle r of image n is row r N + n."""
    o, n = loss.options, len(batch.labels)
    both = lambda x, get: torch.cat([get(x), get(x.views["turned"])])  # noqa: E731
    z_s, z_t = (both(x, lambda a: a.logits) for x in (student, teacher))
    total = o.logits * divergence(z_s, z_t, o.temperature)
    for i, name in enumerate(("one", "two")):
        f_s, f_t = (both(x, lambda a, name=name: a.features[name]) for x in (student, teacher))
        b_s = answer(loss.student_branches[i], f_s, STRIDES["student"][name])
        b_t = answer(loss.teacher_branches[i], f_t, STRIDES["teacher"][name])
        total = total + o.joint * divergence(b_s, b_t.detach(), o.temperature)
        for row in range(4 * n):
            angle, image = divmod(row, n)
            logs = b_t[row] - b_t[row].logsumexp(0)
            if batch.labels.ndim == 1:
                total = total - logs[4 * batch.labels[image] + angle] / (4 * n)
            else:
                total = total - sum(share * logs[4 * c + angle] for c, share in enumerate(batch.labels[image])) / (4 * n)
    return total


@pytest.mark.parametrize("options", [{}, {"joint": 0.0, "logits": 2.0}, {"joint": 3.0, "logits": 0.0, "temperature": 1.0}], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_is_the_formula(count, options):
    loss, *given = hsakd(count=count, **options)
    assert_agrees(loss, formula, *given)


def test_is_the_formula_for_mixed_labels():
    loss, student, teacher, batch = hsakd(count=2)
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 0.5, 0, 0.5]])
    assert_agrees(loss, formula, student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


def test_the_teachers_branches_learn_by_class_and_angle_alone():
    loss, student, teacher, batch = hsakd()
    loss(student, teacher, batch).backward()
    found = [weight.grad.clone() for weight in loss.teacher_branches.parameters()]
    loss.zero_grad()
    loss.options = HSAKD.Options(layers=PAIRS, joint=0.0, logits=0.0)
    loss(student, teacher, batch).backward()
    for got, weight in zip(found, loss.teacher_branches.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad)


def test_branches_that_rest_cost_nothing():
    loss, *given = hsakd()
    learning = loss(*given)
    loss.teacher_branches.requires_grad_(False)
    assert loss(*given) < learning - 1
    torch.testing.assert_close(loss(*given), hsakd_without_labels(loss, *given))


def hsakd_without_labels(loss, student, teacher, batch):
    o = loss.options
    z_s, z_t = (torch.cat([x.logits, x.views["turned"].logits]) for x in (student, teacher))
    total = divergence(z_s, z_t, o.temperature)
    for i, name in enumerate(("one", "two")):
        f_s, f_t = (torch.cat([x.features[name], x.views["turned"].features[name]]) for x in (student, teacher))
        total = total + divergence(loss.student_branches[i](f_s), loss.teacher_branches[i](f_t), o.temperature)
    return total


def test_refuses():
    with pytest.raises(kdkit.ShapeError, match=r"`schedule: \{use: staged, turned: true\}`"):
        HSAKD(HSAKD.Options(layers=PAIRS)).setup(random_outputs(STUDENT), random_outputs(TEACHER))
    answers = random_outputs(STUDENT, views=TURNED), random_outputs(TEACHER, views=TURNED, classes=7)
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        HSAKD(HSAKD.Options(layers=PAIRS)).setup(*answers)


STAGES = [
    {"name": "branches", "losses": ["hsakd"], "train": ["hsakd.teacher_branches"], "epochs": 3},
    {"name": "distill", "train": ["student", "hsakd.student_branches"], "epochs": 1},
]


@pytest.mark.slow
def test_trains_the_teachers_branches_first_and_then_the_student(tmp_path):
    layers = [{"student": "stage2", "teacher": "stage2"}, {"student": "stage4", "teacher": "stage4"}]
    losses = [{"use": "cross_entropy"}, {"use": "hsakd", "layers": layers}]
    train(tmp_path, losses=losses, schedule={"use": "staged", "turned": True, "stages": STAGES}, run={"log_steps": 1})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = {
        stage: [line["train"]["hsakd"] for line in lines if line["kind"] == "epoch" and line["stage"] == stage]
        for stage in ("branches", "distill")
    }
    assert values["branches"][2] < values["branches"][0] and values["distill"][0] < values["branches"][0]
