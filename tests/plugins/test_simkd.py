import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_adapters_learn, random_batch, random_outputs
from kdkit.testing.forms import CLASSES, Network

SimKD = registry.load().losses["simkd"]
PAIR = [{"student": "a", "teacher": "b"}]


def simkd(student, teacher, size=4, layers=PAIR, **options):
    """The loss, set up with a teacher whose logits are its classifier's of the layer, and what it compares."""
    torch.manual_seed(0)
    networks = Network({"a": student}), Network({"b": teacher})
    s, t = random_outputs({"a": student}, size=size), networks[1].answer(random_outputs({"b": teacher}, size=size, seed=1))
    loss = SimKD(SimKD.Options(layers=layers, **options))
    loss.setup(s, t, kdkit.Context(*networks, CLASSES, 64, torch.arange(64) % CLASSES))
    return loss, s, t, random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    if x.numel() == x.shape[1]:  # the running ones
        mean, variance = torch.zeros_like(x), torch.ones_like(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def window_means(f, size):
    (h, w), rows = f.shape[2:], []
    for i in range(size[0]):
        windows = [
            f[:, :, i * h // size[0] : -(-(i + 1) * h // size[0]), j * w // size[1] : -(-(j + 1) * w // size[1])] for j in range(size[1])
        ]
        rows.append(torch.stack([window.sum((2, 3)) / window[0, 0].numel() for window in windows], 2))
    return torch.stack(rows, 2)


def formula(loss, student, teacher, batch):
    f_s, f_t = student.features["a"], teacher.features["b"]
    size = [min(s, t) for s, t in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    x, f_t = window_means(f_s, size), window_means(f_t, size)
    for conv, norm in ((loss.projector[i], loss.projector[i + 1]) for i in (0, 3, 6)):
        x = normalised(F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2), norm).clamp_min(0)
    return ((x - f_t) ** 2).sum() / f_t.numel()


SHAPES = [
    ((3, 4, 4), (4, 4, 4)),
    ((6, 4, 4), (6, 4, 4)),
    ((3, 8, 8), (5, 4, 4)),
    ((3, 2, 2), (5, 4, 4)),
    ((3, 5, 7), (4, 3, 9)),
    ((3, 1, 1), (6, 2, 2)),
]


@pytest.mark.parametrize("shapes", SHAPES[:5])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, factor, shapes):
    loss, *given = simkd(*shapes, size=size, factor=factor)
    assert_agrees(loss, formula, *given)


def test_a_single_position_is_normalised_by_running_statistics():
    loss, *given = simkd(*SHAPES[5], size=1)
    assert_agrees(loss, formula, *given)


def test_gradient():
    loss, student, teacher, batch = simkd((3, 4, 3), (4, 2, 3), size=3)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_the_projector_narrows_by_the_factor():
    widths = {factor: [simkd((3, 4, 4), (8, 4, 4), factor=factor)[0].projector[i].out_channels for i in (0, 3, 6)] for factor in (1, 2, 64)}
    assert widths == {1: [8, 8, 8], 2: [4, 4, 8], 64: [1, 1, 8]}
    check_adapters_learn(SimKD, factor=1)


def test_refuses():
    s, t = random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}, seed=1)
    with pytest.raises(kdkit.ShapeError, match="needs the teacher's classifier"):
        SimKD(SimKD.Options(layers=PAIR)).setup(s, t)
    with pytest.raises(kdkit.ShapeError, match="one pair, not 2"):
        simkd((3, 4, 4), (5, 4, 4), layers=PAIR * 2)
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        simkd((3,), (5, 4, 4))
    context = kdkit.Context(Network({"a": (3,)}), Network({"b": (5,)}), CLASSES, 64, torch.arange(64) % CLASSES)
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'b' \(6, 5, 4, 4\) .* its head is more than"):
        SimKD(SimKD.Options(layers=PAIR)).setup(s, t, context)


def networks(student_blocks=1):
    torch.manual_seed(0)
    make = lambda widths: ResNet(BasicBlock, layers=[student_blocks, 1, 1, 1], num_classes=6, channels=widths)  # noqa: E731
    return make((4, 4, 8, 8)), make((8, 8, 8, 16)).eval()


def trained(layer="stage4"):
    """A student, the teacher, the loss after a step, and some images."""
    student, teacher = networks()
    loss, images = SimKD(SimKD.Options(layers=[{"student": layer, "teacher": "stage4"}])), torch.rand(4, 3, 64, 64)
    tapped, taught = kdkit.taps(student, [layer]), kdkit.taps(teacher, ["stage4"])
    student.eval()
    with torch.no_grad():
        s, t = tapped(images), taught(images)
    loss.setup(s, t, kdkit.Context(student, teacher, 6, 4, torch.arange(4)))
    return student, teacher, loss, images, tapped, t


def step(student, loss, images, tapped, t):
    student.train()
    optimizer = torch.optim.SGD([*student.parameters(), *loss.projector.parameters()], lr=0.1)
    loss(tapped(images), t, kdkit.Batch(images, torch.zeros(4), torch.arange(4))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layer", ["stage4", "layer4", "layer4.0.act2", "stage3"])
def test_what_is_deployed_is_backbone_projector_and_the_teacher_s_classifier(layer):
    student, teacher, loss, images, tapped, t = trained(layer)
    deployed = loss.deploy(student)
    for _ in range(2):  # before and after a step: parameters and statistics are the student's own
        deployed.eval(), student.eval(), loss.eval()
        with torch.no_grad():
            f = tapped(images).features[layer]
            pooled = F.adaptive_avg_pool2d(f, [min(a, b) for a, b in zip(f.shape[2:], t.features["stage4"].shape[2:], strict=True)])
            torch.testing.assert_close(deployed(images), teacher.fc(loss.projector(pooled).mean((2, 3))))
        loss.train()
        step(student, loss, images, tapped, t)


def test_the_student_s_own_classifier_is_left_out_and_the_student_left_whole():
    student, _, loss, images, *_ = trained()
    before = student(images)
    deployed = loss.deploy(student)
    own, found = {id(p) for p in student.parameters()}, {id(p) for p in deployed.parameters()}
    assert own - found == {id(p) for p in student.fc.parameters()}
    assert {id(b) for b in student.buffers()} <= {id(b) for b in deployed.buffers()}
    assert torch.equal(student(images), before) and not any("fc" in name for name in deployed.state_dict())
    deployed.train()
    assert not any(part.training for part in student.modules())


def test_a_copy_of_the_deployed_network_is_independent():
    student, _, loss, images, *_ = trained()
    deployed = loss.deploy(student).eval()
    copied, before = copy.deepcopy(deployed), deployed(images)
    with torch.no_grad():
        for p in deployed.parameters():
            p.mul_(0.5)
    assert torch.equal(copied(images), before) and not torch.equal(deployed(images), before)
    copied.load_state_dict(deployed.state_dict())
    assert torch.equal(copied(images), deployed(images))


def test_keeps_no_tensor_between_calls():
    student, _, loss, images, *_ = trained()
    deployed = loss.deploy(student).eval()
    deployed(images)
    assert not deployed.backbone._store.values and not deployed.backbone._store.open
    student(images)
    assert not deployed.backbone._store.values


def test_the_deployed_network_can_be_exported():
    student, _, loss, images, *_ = trained()
    deployed = loss.deploy(student).eval()
    program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images[:3]), deployed(images[:3]))
