import copy

import pytest
import torch
import torch.nn.functional as F
from promises import check_but
from timm.models.resnet import BasicBlock, ResNet

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.forms import CLASSES, Network

NORM = registry.load().losses["norm"]
PAIR = [{"student": "a", "teacher": "b"}]


def norm(student, teacher, size=4, layers=PAIR, **options):
    """The loss, set up with a student whose logits are its classifier's of the layer, and what it compares."""
    torch.manual_seed(0)
    networks = Network({"a": student}), Network({"b": teacher})
    s, t = networks[0].answer(random_outputs({"a": student}, size=size)), random_outputs({"b": teacher}, size=size, seed=1)
    loss = NORM(NORM.Options(layers=layers, **options))
    loss.setup(s, t, kdkit.Context(*networks, CLASSES, 64, torch.arange(64) % CLASSES))
    return loss, s, t, random_batch(size)


def convolved(x, part):
    conv, norm = part
    x = torch.einsum("bchw,dc->bdhw", x, conv.weight[:, :, 0, 0])
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    if x.numel() == x.shape[1]:  # the running ones
        mean, variance = torch.zeros_like(x), torch.ones_like(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def max_pooled(f, size):
    height, width = f.shape[2] // size[0], f.shape[3] // size[1]
    rows = [
        torch.stack([f[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width].flatten(2).amax(2) for j in range(size[1])], 2)
        for i in range(size[0])
    ]
    return torch.stack(rows, 2)


def log_softmax(z):
    return z - z.exp().sum().log()


def formula(loss, student, teacher, batch):
    """One segment and one sample at a time."""
    o, own = loss.options, loss.student_classifier[0].double()
    f_s, f_t, total = kdkit.as_map(student.features["a"]), teacher.features["b"], 0
    expanded = convolved(f_s, loss.expand)
    f = convolved(expanded, loss.contract) + (f_s if o.residual else 0)
    size = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    expanded, f_t = max_pooled(expanded, size), max_pooled(f_t, size)
    for i in range(o.segments):
        segment = expanded[:, i * f_t.shape[1] : (i + 1) * f_t.shape[1]]
        total = total + o.features * ((segment - f_t) ** 2).sum() / f_t.numel()
    for x, z_t, y in zip(f, teacher.logits, batch.classes, strict=True):
        z = own.weight @ (x.flatten(1).sum(1) / x[0].numel()) + own.bias
        if o.logit_scale:
            z, z_t = (o.logit_scale * (v - v.mean()) / (v.var(correction=0) + 1e-7).sqrt() for v in (z, z_t))
        log_p, log_q = log_softmax(z / o.temperature), log_softmax(z_t / o.temperature)
        soft = o.temperature**2 * (log_q.exp() * (log_q - log_p)).sum()
        total = total + (o.soft * soft - o.labels * log_softmax(z)[y]) / len(f)
    return total


SHAPES = [((3, 4, 4), (4, 4, 4)), ((3, 4, 4), (4, 2, 2)), ((3, 2, 2), (5, 4, 6)), ((16, 3), (5, 4, 4))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segments": 3, "residual": False, "soft": 0.5},
        {"logit_scale": 0.0, "labels": 1.0, "soft": 2.0, "temperature": 1.0, "features": 0.5},
    ],
)
# not one: normalised over its own positions, the contracted map has a mean that teaches nothing
@pytest.mark.parametrize("size", [2, 16])
def test_is_the_formula(size, options, shapes):
    loss, *given = norm(*shapes, size=size, **options)
    assert_agrees(loss, formula, *given)


def test_a_student_that_gives_the_teacher_s_map_in_each_segment_has_no_error():
    loss, student, teacher, batch = norm((4, 3, 3), (4, 3, 3), segments=2, labels=1e-9)
    loss.expand = torch.nn.Conv2d(4, 8, 1, bias=False)
    with torch.no_grad():
        loss.expand.weight.copy_(torch.eye(4).repeat(2, 1)[:, :, None, None])
        same = kdkit.Outputs(student.logits, {"a": teacher.features["b"]})
        assert loss(same, teacher, batch).item() == pytest.approx(0, abs=1e-7)
        loss.expand.weight[4:] *= 2
        expected = teacher.features["b"].square().mean().item()  # of the second segment alone
        assert loss(same, teacher, batch).item() == pytest.approx(expected, rel=1e-5)


def test_mixed_labels():
    loss, student, teacher, batch = norm(*SHAPES[0])
    certain = kdkit.Batch(batch.inputs, F.one_hot(batch.labels, CLASSES).float(), batch.index)
    torch.testing.assert_close(loss(student, teacher, certain), loss(student, teacher, batch))


def test_logits_of_ten_thousand():
    loss, student, teacher, batch = norm(*SHAPES[0], soft=1.0, logit_scale=0.0)
    f = (1e4 * student.features["a"]).requires_grad_()
    value = loss(kdkit.Outputs(1e4 * student.logits, {"a": f}), kdkit.Outputs(-1e4 * teacher.logits, teacher.features), batch)
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"segments": 1, "residual": False, "soft": 1.0}, {"logit_scale": 0.0, "soft": 0.5}])
def test_keeps_the_promises_with_options(options):
    check_but(NORM, **options)


def test_refuses():
    s, t = random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}, seed=1)
    with pytest.raises(kdkit.ShapeError, match="needs the student's classifier"):
        NORM(NORM.Options(layers=PAIR)).setup(s, t)
    with pytest.raises(kdkit.ShapeError, match="one pair, not 2"):
        norm((3, 4, 4), (5, 4, 4), layers=PAIR * 2)
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        norm((3,), (5, 4, 4))
    context = kdkit.Context(Network({"a": (3,)}), Network({"b": (5,)}), CLASSES, 64, torch.arange(64) % CLASSES)
    with pytest.raises(kdkit.ShapeError, match=r"student 'a' \(6, 3, 4, 4\) .* its head is more than"):
        NORM(NORM.Options(layers=PAIR)).setup(s, t, context)
    with pytest.raises(kdkit.ShapeError, match=r"\(6, 5\) and teacher logits \(6, 7\).*class set"):
        NORM(NORM.Options(layers=PAIR)).setup(s, random_outputs({"b": (5, 4, 4)}, classes=7), context)


def trained(layer="stage4", **options):
    """A student, the loss, some images, and what makes a step of both."""
    torch.manual_seed(0)
    student, teacher = (ResNet(BasicBlock, layers=[1, 1, 1, 1], num_classes=6, channels=widths) for widths in ((4, 4, 8, 8), (8, 8, 8, 16)))
    loss, images = NORM(NORM.Options(layers=[{"student": layer, "teacher": "stage4"}], **options)), torch.rand(4, 3, 64, 64)
    tapped, taught = kdkit.taps(student, [layer]), kdkit.taps(teacher.eval(), ["stage4"])
    student.eval()
    with torch.no_grad():
        s, t = tapped(images), taught(images)
    loss.setup(s, t, kdkit.Context(student, teacher, 6, 4, torch.arange(4)))
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)

    def step():
        student.train(), loss.train()
        loss(tapped(images), t, kdkit.Batch(images, torch.arange(4), torch.arange(4))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return student, loss, images, step


@pytest.mark.parametrize("options", [{}, {"residual": False, "logit_scale": 0.0}])
def test_what_is_deployed_classifies_the_contracted_map(options):
    student, loss, images, step = trained(**options)
    deployed = loss.deploy(student)
    for _ in range(2):  # before and after a step: parameters and statistics are the student's own
        deployed.eval(), student.eval(), loss.eval()
        with torch.no_grad():
            f = student.forward_features(images)
            f = loss.contract(loss.expand(f)) + (0 if options else f)
            z = student.fc(f.mean((2, 3)))
            expected = z if options else 2.5 * F.layer_norm(z, (6,), eps=1e-7)
            torch.testing.assert_close(deployed(images), expected)
        step()


def test_a_step_trains_the_students_classifier_and_both_convolutions():
    student, loss, images, step = trained()
    before = copy.deepcopy([student.fc.weight, loss.expand[0].weight, loss.contract[0].weight])
    step()
    for old, new in zip(before, [student.fc.weight, loss.expand[0].weight, loss.contract[0].weight], strict=True):
        assert not torch.equal(old, new)


def test_the_student_is_left_whole_and_a_copy_of_what_is_deployed_is_independent():
    student, loss, images, _ = trained()
    before = student(images)
    deployed = loss.deploy(student).eval()
    assert {id(p) for p in student.parameters()} <= {id(p) for p in deployed.parameters()}
    assert torch.equal(student(images), before) and not student.training
    copied, answer = copy.deepcopy(deployed), deployed(images)
    with torch.no_grad():
        for p in deployed.parameters():
            p.mul_(0.5)
    assert torch.equal(copied(images), answer)
    copied.load_state_dict(deployed.state_dict())
    assert torch.equal(copied(images), deployed(images))


def test_the_deployed_network_can_be_exported():
    student, loss, images, _ = trained()
    deployed = loss.deploy(student).eval()
    program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images[:3]), deployed(images[:3]))
