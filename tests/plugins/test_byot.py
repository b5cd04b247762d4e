import copy

import pytest
import torch
import torch.nn.functional as F
from training import PLAIN, TINY, train, weights

import kdkit
from kdkit.recipe import registry
from kdkit.runs import training
from kdkit.students.loaded import LoadedRun
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

BYOT = registry.load().losses["byot"]
SHAPES = {"shallow": (3, 8, 8), "middle": (5, 4, 4), "deep": (8, 2, 2)}
PAIRS = [{"student": "shallow", "teacher": "deep"}, {"student": "middle", "teacher": "deep"}]


def byot(layers=PAIRS, shapes=SHAPES, size=4, **options):
    """The loss, set up, and what it reads."""
    torch.manual_seed(0)
    loss, student = BYOT(BYOT.Options(layers=layers, **options)), random_outputs(shapes, size=size)
    loss.setup(student, None)
    return loss, student, random_outputs(), random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def formula(loss, student, teacher, batch):
    """The layers of each exit written out, then one sample and one class at a time."""
    o, deepest, total = loss.options, student.features["deep"].detach(), 0
    for leave, pair in zip(loss.exits, o.layers, strict=True):
        x, parts = student.features[pair.student], list(leave.bottleneck)
        for conv, norm in zip(parts[::3], parts[1::3], strict=True):
            stride = 1 if conv.kernel_size[0] == 1 else 2
            x = normalised(F.conv2d(x, conv.weight, stride=stride, padding=conv.kernel_size[0] // 2), norm)
            x = x if conv is parts[-2] else x.clamp_min(0)
        logits = x.flatten(2).mean(2) @ leave.classifier.weight.T + leave.classifier.bias
        total = total + o.hint * ((x - deepest) ** 2).sum() / deepest.numel()
        for z, z_s, label in zip(logits, student.logits.detach(), batch.labels, strict=True):
            p, q = ((a / o.temperature).exp() / (a / o.temperature).exp().sum() for a in (z, z_s))
            soft = o.temperature**2 * sum(q[k] * (q[k].log() - p[k].log()) for k in range(len(z)))
            total = total + (o.soft * soft - o.labels * (z[label].exp() / z.exp().sum()).log()) / len(logits)
    return total


@pytest.mark.parametrize("options", [{}, {"labels": 0.0, "hint": 2.0}, {"soft": 0.0}, {"temperature": 1.0, "labels": 0.1, "hint": 0.0}])
@pytest.mark.parametrize("size", [2, 5])
def test_is_the_formula(size, options):
    """Which takes what the student's deepest layer and its logits give for constants."""
    loss, *given = byot(size=size, **options)
    assert_agrees(loss, formula, *given)


def test_a_bottleneck_halves_as_often_as_it_must():
    strides = [[part.stride[0] for part in leave.bottleneck if isinstance(part, torch.nn.Conv2d)] for leave in byot()[0].exits]
    assert strides == [[1, 2, 2, 1], [1, 2, 1]]


@pytest.mark.parametrize(
    ("shallow", "deep"), [((3, 9, 7), (8, 2, 3)), ((3, 2, 2), (8, 4, 4)), ((9, 6), (4, 3, 3)), ((3, 8, 8), (6,)), ((5,), (6,))]
)
def test_any_forms_will_do(shallow, deep):
    loss, student, _, batch = byot([{"student": "a", "teacher": "b"}], {"a": shallow, "b": deep})
    assert loss(student, None, batch).isfinite()


def test_the_deepest_answer_gets_no_gradient():
    loss, student, _, batch = byot()
    student = student.map(lambda x: x.requires_grad_())
    loss(student, None, batch).backward()
    assert student.logits.grad is None and student.features["deep"].grad is None
    assert student.features["shallow"].grad.any() and student.features["middle"].grad.any()


@pytest.mark.first(1)
@pytest.mark.parametrize("options", [{"hint": 0.0}, {"labels": 0.0}, {"keep": True, "temperature": 1.0}])
def test_keeps_the_promises_with_options(options):
    check_loss(BYOT, **options)


def test_refuses_what_is_no_stage():
    with pytest.raises(kdkit.ShapeError, match=r"student 'shallow' \(4, 15, 6\) is no map.*, nor a vector; name a stage"):
        byot(shapes={**SHAPES, "shallow": (15, 6)})


EXITS = {"use": "byot", "layers": [{"student": f"stage{i}", "teacher": "stage4"} for i in (1, 2, 3)]}
RECIPE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "supervised"},
    "losses": [{"use": "cross_entropy"}, EXITS],
    "train": {**PLAIN["train"], "epochs": 1},
}


def test_trains_without_a_teacher_and_leaves_the_exits_behind(tmp_path):
    train(tmp_path, RECIPE)
    train(tmp_path, RECIPE, into="alone", losses=RECIPE["losses"][:1])
    ours, alone = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert ours.keys() == alone.keys() and not torch.equal(ours["conv1.weight"], alone["conv1.weight"])


def test_everything_moves(tmp_path, monkeypatch):
    trainers, build = [], training.build_trainer
    begin = []

    def building(*args):
        trainers.append(build(*args))
        begin.append(copy.deepcopy(dict(trainers[-1].learner.named_parameters())))
        return trainers[-1]

    monkeypatch.setattr(training, "build_trainer", building)
    train(tmp_path, RECIPE)
    still = [name for name, value in trainers[0].learner.named_parameters() if torch.equal(value, begin[0][name])]
    assert still == []
    assert any("exits" in name for name in begin[0])


@pytest.mark.parametrize("teacher", [PLAIN["teacher"], {"model": "cifar/resnet8"}], ids=["four stages", "three stages"])
def test_works_beside_a_teacher(tmp_path, teacher):
    """All layers that it names are the student's: the teacher need not have them."""
    losses = [
        *PLAIN["losses"],
        EXITS,
        {"use": "byot", "name": "neighbours", "layers": [{"student": "stage[123]", "teacher": "stage[234]"}]},
    ]
    result = train(tmp_path, {**PLAIN, "teacher": teacher, "losses": losses, "train": RECIPE["train"]})
    assert result.test["nll"] > 0


def test_kept_exits_are_deployed_and_answer(tmp_path):
    train(tmp_path, RECIPE, into="dropped")
    train(tmp_path, RECIPE, losses=[{"use": "cross_entropy"}, {**EXITS, "keep": True}])
    dropped, kept = weights(tmp_path / "dropped"), weights(tmp_path / "run")
    assert {f"network.{name}" for name in dropped} < set(kept)
    assert all(torch.equal(kept[f"network.{name}"], value) for name, value in dropped.items())
    student = LoadedRun(tmp_path / "run").student()
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        answers, own = student.module.answers(student.adapt(images)), student(images).logits
    assert len(answers) == 4 and torch.equal(answers[-1], own)
    assert all(z.shape == (3, 6) and not torch.equal(z, own) for z in answers[:-1])
    program = torch.export.export(student.module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images[:2]), student.module(images[:2]))


def test_a_copy_of_what_is_deployed_is_independent():
    from timm.models.resnet import BasicBlock, ResNet

    network = ResNet(BasicBlock, layers=[1, 1, 1, 1], num_classes=5, channels=TINY["args"]["channels"]).eval()
    loss, images = BYOT(BYOT.Options(layers=EXITS["layers"], keep=True)), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        loss.setup(kdkit.taps(network, [f"stage{i}" for i in range(1, 5)])(images), None)
        deployed = loss.eval().deploy(network)
        copied, before = copy.deepcopy(deployed), deployed.answers(images)
        for p in deployed.parameters():
            p.mul_(0.5)
        assert all(torch.equal(one, other) for one, other in zip(copied.answers(images), before, strict=True))
    assert not torch.equal(deployed.answers(images)[0], before[0])
