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

SCALE = registry.load().losses["scalekd"]
ALIKE = [{"student": name, "teacher": name} for name in ("stage3", "stage4")]


def resnet(channels, seed):
    torch.manual_seed(seed)
    network = ResNet(BasicBlock, layers=[1, 1, 1, 1], num_classes=5, channels=channels).double().eval()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return network


def behind(network, layer, taps):
    return Rest(TappedModel(network, input_shape=(3, 64, 64)), layer, taps)


def scalekd(size=4, layers=ALIKE, **options):
    """The loss, set up with two networks, their answers, and a batch; last the teacher."""
    student, teacher = resnet((4, 6, 6, 8), 0), resnet((4, 8, 10, 12), 1).requires_grad_(False)
    images = torch.rand(size, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        s, t = (kdkit.taps(x, [pair[side] for pair in layers])(images) for x, side in ((student, "student"), (teacher, "teacher")))
    torch.manual_seed(2)
    loss = SCALE(SCALE.Options(layers=layers, **{"heads": 2, **options}))
    loss.setup(s, t, kdkit.Context(student, teacher, 5, 0, torch.empty(0), behind))
    return loss, s.map(torch.Tensor.float), t.map(torch.Tensor.float), random_batch(size), teacher


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def projected(part, f, queries, heads, scale, shape):
    """One sample, one head and one query at a time."""
    conv, norm, _ = part.features
    f = normalised(F.conv2d(f, conv.weight, padding=1), norm).clamp_min(0) + part.positions
    queries = part.queries.expand(len(f), -1, -1, -1) if part.queries is not None else queries
    one, _, two = part.asked
    out, layer_norm = part.out
    first, _, second = part.more
    maps = []
    for x, wanted in zip(f, queries, strict=True):
        known, found = x.flatten(1).T, []
        for q in wanted.flatten(1).T:
            q = two.weight @ (one.weight @ q + one.bias).clamp_min(0) + two.bias
            width, mixed = len(q) // heads, []
            for h in range(heads):
                rows = slice(h * width, (h + 1) * width)
                weights = (scale * (known @ part.key.weight[rows].T) @ q[rows] / width**0.5).softmax(0)
                mixed.append(weights @ (known @ part.value.weight[rows].T + part.value.bias[rows]))
            token = out.weight @ torch.cat(mixed) + out.bias
            token = (token - token.mean()) / (token.var(correction=0) + layer_norm.eps).sqrt() * layer_norm.weight + layer_norm.bias
            found.append(token + second.weight @ (first.weight @ token + first.bias).clamp_min(0) + second.bias)
        maps.append(torch.stack(found, 1).reshape(shape))
    return torch.stack(maps)


def distance(x, t):
    return ((x / x.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)) ** 2).sum() / len(x)


def naive(teacher):
    def formula(loss, student, teacher_answer, batch):
        o, total, queries = loss.options, 0, [None, None]
        targets = [teacher_answer.features[pair.teacher] for pair in o.layers]
        for number, pair in enumerate(o.layers):
            shape = targets[number].shape[1:]
            queries = [
                projected(loss.projectors[2 * number + i], student.features[pair.student], queries[i], o.heads, o.softmax_scale, shape)
                for i in range(2)
            ]
            if len(o.layers) == 2 and number == 0:
                queries = [teacher.layer4(x) for x in queries]
            x, y, t = queries[0], queries[1] - queries[1].mean((2, 3), keepdim=True), targets[-1]
            total = total + o.spatial * distance(x, t) + o.centred * distance(y, t - t.mean((2, 3), keepdim=True))
        return total

    return formula


@pytest.mark.parametrize(
    ("layers", "options"), [(ALIKE, {}), (ALIKE, {"spatial": 1.0, "centred": 0.5, "softmax_scale": 1.0}), (ALIKE[1:], {"heads": 3})]
)
@pytest.mark.parametrize("size", [1, 3])
def test_is_the_formula(size, layers, options):
    loss, student, teacher, batch, network = scalekd(size, layers, **options)
    # what they add to all positions alike goes away with the mean: their gradient is rounding, or little more
    for layer in (loss.projectors[-1].out[1], loss.projectors[-1].more[0], loss.projectors[-1].more[2]):
        layer.bias.requires_grad_(False)
    assert_agrees(loss, naive(network), student, teacher, batch)


def test_no_constant_of_a_channel_counts_in_the_second_distance():
    loss, student, teacher, batch, _ = scalekd(layers=ALIKE[1:], spatial=0.0)
    moved = kdkit.Outputs(teacher.logits, {"stage4": teacher.features["stage4"] + torch.arange(12.0)[:, None, None]})
    torch.testing.assert_close(loss(student, moved, batch), loss(student, teacher, batch), rtol=1e-4, atol=1e-6)
    plain = scalekd(layers=ALIKE[1:], centred=0.0)[0]
    assert not torch.allclose(plain(student, moved, batch), plain(student, teacher, batch))


def test_the_cosine_transform_without_its_constant_component_is_the_map_less_its_mean():
    n = 7
    k = torch.arange(n, dtype=torch.float64)
    transform = torch.cos(torch.pi / n * (k[None] + 0.5) * k[:, None])
    f = torch.randn(3, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    components = transform @ f @ transform.T
    components[:, 0, 0] = 0
    torch.testing.assert_close(transform.inverse() @ components @ transform.inverse().T, f - f.mean((1, 2), keepdim=True))


def test_the_teacher_stays_and_the_first_projectors_learn_through_it():
    loss, student, teacher, batch, network = scalekd()
    before = copy.deepcopy(network.state_dict())
    loss(student, teacher, batch).backward()
    assert loss.projectors[0].queries.grad.any() and loss.projectors[2].queries is None
    assert not any(p.grad is not None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(name.startswith("projectors") for name in loss.state_dict())


def test_keeps_the_promises_with_one_pair():
    check_but(SCALE, heads=2)


def test_refuses():
    loss, student, teacher, *_ = scalekd()
    with pytest.raises(kdkit.ShapeError, match="one or two pairs of layers, not 3"):
        scalekd(layers=[{"student": "stage2", "teacher": "stage2"}, *ALIKE])
    with pytest.raises(kdkit.ShapeError, match="`heads: 4` must divide the teacher's channels, 10 and 12"):
        scalekd(heads=4)
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'stage3' \(4, 10, 4, 4\) passes through"):
        loss.setup(student, teacher)
    tokens = random_outputs({"stage3": (17, 6), "stage4": (17, 6)}, size=4)
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'stage3' \(4, 17, 6\) passes through"):
        loss.setup(student, tokens, kdkit.Context(resnet((4, 6, 6, 8), 0), None, 5, 0, torch.empty(0), behind))
