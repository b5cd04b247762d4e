import copy

import pytest
import torch
import torch.nn.functional as F
from promises import check_but
from timm.models.resnet import BasicBlock, ResNet

import kdkit
from kdkit.models.rest import Rest
from kdkit.models.tapped import TappedModel
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

FCFD = registry.load().losses["fcfd"]
STAGES = ["stage2", "stage3", "stage4"]
ALIKE = [{"student": name, "teacher": name} for name in STAGES]


def resnet(channels, seed):
    torch.manual_seed(seed)
    network = ResNet(BasicBlock, layers=[1, 1, 1, 1], num_classes=5, channels=channels).double()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # of other statistics than those of a batch
            torch.nn.init.normal_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return network


def fcfd(size=4, layers=ALIKE, training=True, **options):
    """The loss, set up with two networks, their answers, and a batch."""
    student, teacher = resnet((4, 6, 6, 8), 0).eval(), resnet((4, 8, 10, 12), 1).eval().requires_grad_(False)
    images = torch.rand(size, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        s = kdkit.taps(student, [pair["student"] for pair in layers])(images)
        t = kdkit.taps(teacher, [pair["teacher"] for pair in layers])(images)
    torch.manual_seed(2)
    loss = FCFD(FCFD.Options(layers=layers, **options))
    loss.setup(s, t, kdkit.Context(student, teacher, 5, 0, torch.empty(0), behind))
    student.train(training)
    return loss, s.map(torch.Tensor.float), t.map(torch.Tensor.float), random_batch(size), (student, teacher)


def behind(network, layer, taps):
    return Rest(TappedModel(network, input_shape=(3, 64, 64)), layer, taps)


def bridged(part, f, like):
    conv, norm, *rest = part.layers
    f = conv(f)
    mean, variance = f.mean((0, 2, 3), keepdim=True), f.var((0, 2, 3), correction=0, keepdim=True)
    f = (f - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    f = torch.where(f > 0, f, 0.1 * f) if rest else f
    return F.interpolate(f, size=like.shape[2:], mode="bilinear", align_corners=False)


def kl(z, z_t, t):
    log_p, log_q = (z / t).log_softmax(1), (z_t / t).log_softmax(1)
    return t**2 * (log_q.exp() * (log_q - log_p)).sum() / len(z)


def rest_of(network, stage, f):
    """The maps of the stages behind one, and the logits, by the network's own modules."""
    maps = {}
    for number in range(int(stage.removeprefix("stage")) + 1, 5):
        f = maps[f"stage{number}"] = network.get_submodule(f"layer{number}")(f)
    return maps, network.fc(f.mean((2, 3)))


def errors(maps, targets):
    last, wanted = (f.clamp_min(0).mean((2, 3)) for f in (maps[-1], targets[-1]))
    return sum(((a - b) ** 2).sum() / b.numel() for a, b in zip([*maps, last], [*targets, wanted], strict=True))


def naive(networks):
    def formula(loss, student, teacher, batch):
        o = loss.options
        # copies: a network that is trained changes its statistics
        ours, theirs = (copy.deepcopy(network) for network in networks)
        f_s, f_t = [student.features[pair.student] for pair in o.layers], [teacher.features[pair.teacher] for pair in o.layers]
        guesses = [bridged(part, s, t) for part, s, t in zip(loss.bridges, f_s, f_t, strict=True)]
        distance, mixed, z = errors(guesses, f_t), 0, []
        for k in range(len(f_t) - 1):
            if o.direction != "to_student":
                maps, logits = rest_of(theirs, o.layers[k].teacher, guesses[k])
                mixed = mixed + errors([maps[pair.teacher] for pair in o.layers[k + 1 :]], f_t[k + 1 :])
                z.append(logits)
            if o.direction != "to_teacher":
                z.append(rest_of(ours, o.layers[k].student, bridged(loss.back[k], f_t[k], f_s[k]))[1])
        share = min(1, o.paths / len(z))
        return o.features * (distance + share * mixed) + o.mixed * share * sum(kl(x, teacher.logits, o.temperature) for x in z)

    return formula


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "to_teacher", "paths": 1, "features": 5.0, "rectified": False},
        {"direction": "to_student", "paths": 7, "mixed": 0.2, "temperature": 8.0},
    ],
)
@pytest.mark.parametrize("size", [2, 5])
def test_is_the_formula(size, options, training):
    loss, student, teacher, batch, networks = fcfd(size, training=training, **options)
    assert_agrees(loss, naive(networks), student, teacher, batch)


def test_sizes_that_differ():
    """The student's stage 3 (4 x 4) in the place of the teacher's stage 2 (8 x 8), and the other way about."""
    layers = [{"student": "stage3", "teacher": "stage2"}, {"student": "stage4", "teacher": "stage4"}]
    loss, student, teacher, batch, networks = fcfd(3, layers)
    assert isinstance(loss.bridges[0].layers[0], torch.nn.ConvTranspose2d) and loss.back[0].layers[0].stride == (2, 2)
    assert_agrees(loss, naive(networks), student, teacher, batch)


def test_the_students_later_layers_learn_on_mixed_paths_and_the_teacher_does_not():
    loss, student, teacher, batch, (ours, theirs) = fcfd()
    before = copy.deepcopy([ours.state_dict(), theirs.state_dict()])
    loss(student, teacher, batch).backward()
    assert ours.layer3[0].conv1.weight.grad.any() and ours.fc.weight.grad.any() and ours.conv1.weight.grad is None
    assert not any(p.grad is not None for p in theirs.parameters())
    for network, state in zip((ours, theirs), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not [name for name in loss.state_dict() if not name.startswith(("bridges", "back"))]


def test_a_student_that_has_the_teachers_maps_is_at_no_distance():
    loss, _, teacher, batch, _ = fcfd(direction="to_teacher")
    same = kdkit.Outputs(teacher.logits, teacher.features)
    for part in loss.bridges:
        part.layers = torch.nn.Identity()
    assert loss(same, teacher, batch).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("options", [{"direction": "to_student", "paths": 1}, {"direction": "to_teacher", "rectified": False}])
def test_keeps_the_promises_with_options(options):
    check_but(FCFD, layers=ALIKE, **options)


def test_refuses():
    loss, student, teacher, *_ = fcfd()
    with pytest.raises(kdkit.ShapeError, match="name two or more"):
        fcfd(layers=ALIKE[:1])
    with pytest.raises(kdkit.ShapeError, match="give `setup` a context"):
        loss.setup(student, teacher)
    with pytest.raises(kdkit.ShapeError, match=r"class set"):
        loss.setup(
            student, kdkit.Outputs(torch.zeros(4, 7), teacher.features), kdkit.Context(resnet((4, 6, 6, 8), 0), None, 5, 0, torch.empty(0))
        )
    tokens = random_outputs({name: (17, 6) for name in STAGES}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"'stage2' \(4, 17, 6\).*must be maps"):
        loss.setup(tokens, tokens, kdkit.Context(resnet((4, 6, 6, 8), 0), None, 5, 0, torch.empty(0)))
