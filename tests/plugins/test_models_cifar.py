import copy
import importlib
import os
from pathlib import Path

import pytest
import timm
import torch
import torchvision.datasets
from kdkit_plugins.datasets.torchvision import Cifar10, Cifar100, SmallSetOptions
from kdkit_plugins.models.cifar import CifarSource
from torch import nn

import kdkit
from kdkit.models.build import build_model

DATA = os.environ.get("KDKIT_DATA")
WEIGHTS = Path(DATA or "") / "weights"
real = pytest.mark.skipif(DATA is None or not WEIGHTS.is_dir(), reason="KDKIT_DATA names no folder with the real files and weights")

# Of the networks behind the tables, for 100 classes; papers round them (0.28 M, 7.43 M...).
PARAMETERS = {
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188, "resnet56": 861_620,
    "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860, "resnet50": 23_705_252,
    "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780, "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028, "vgg11": 9_277_284, "vgg13": 9_462_180, "vgg16": 14_774_436, "vgg19": 20_086_692,
    "mobilenet_v2": 812_836, "shufflenet_v1": 949_258, "shufflenet_v2": 1_355_528,
}  # fmt: skip
RESNETS = [16, 32, 64], [32, 16, 8], 64
STAGES = {
    "resnet20": RESNETS,
    "resnet8x4": ([64, 128, 256], [32, 16, 8], 256),
    "resnet50": ([256, 512, 1024, 2048], [32, 16, 8, 4], 2048),
    "wrn_16_1": RESNETS,
    "wrn_40_2": ([32, 64, 128], [32, 16, 8], 128),
    "vgg8": ([128, 256, 512, 512], [16, 8, 4, 4], 512),
    "vgg11": ([128, 256, 512, 512], [16, 8, 4, 4], 512),
    "vgg13": ([128, 256, 512, 512], [16, 8, 4, 4], 512),
    "mobilenet_v2": ([12, 16, 48, 160], [16, 8, 4, 2], 1280),
    "shufflenet_v1": ([240, 480, 960], [16, 8, 4], 960),
    "shufflenet_v2": ([116, 232, 464], [16, 8, 4], 1024),
}
# What the tables compare before the activation, from the second stage on, and the batch norm it comes from (none: a concatenation).
PREACTIVATIONS = {
    "resnet20": [("layer2.2.act2@input", "layer2.2.bn2"), ("layer3.2.act2@input", "layer3.2.bn2")],
    "resnet50": [("layer2.3.act3@input", "layer2.3.bn3"), ("layer4.2.act3@input", "layer4.2.bn3")],
    "wrn_16_2": [("block3.layer.0.bn1", "block3.layer.0.bn1"), ("act1@input", "bn1")],
    "vgg13": [("block2.5@input", "block2.4"), ("block4.5@input", "block4.4")],
    "vgg8": [("block1.2@input", "block1.1"), ("block2.2@input", "block2.1")],
    "mobilenet_v2": [("blocks.4.2.conv.7", "blocks.4.2.conv.7")],
    "shufflenet_v1": [("layer2.7.act3@input", "layer2.7.bn3")],
    "shufflenet_v2": [("layer2.7.act3@input", "layer2.7.bn3")],
}


def build(name, classes=100, layers=(), weights=True, shape=(3, 32, 32), **options):
    source = CifarSource(CifarSource.Options(model=f"cifar/{name}", **options), name)
    return build_model(source.options, source, classes, shape, layers, weights=weights)


def images(model, size=2, shape=(3, 32, 32)):
    return torch.rand(size, *shape, device=next(model.module.parameters()).device)


@pytest.mark.parametrize("name", PARAMETERS)
def test_as_many_parameters_as_published(name):
    model = build(name, weights=False)
    assert sum(value.numel() for value in model.module.parameters()) == PARAMETERS[name]
    assert model(images(model)).logits.shape == (2, 100)


def test_every_network_is_in_the_table():
    assert importlib.import_module("kdkit_plugins.models._cifar.registration").ARCHITECTURES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("name", "channels", "sides", "width"), [(name, *facts) for name, facts in STAGES.items()])
def test_stages(name, channels, sides, width):
    stages = [f"stage{i}" for i in range(1, len(channels) + 1)]
    model = build(name, weights=False, layers=[*stages, "penultimate"])
    features = model(images(model)).features
    assert [tuple(features[stage].shape) for stage in stages] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert features["penultimate"].shape == (2, width)
    assert [32 // entry["reduction"] for entry in model.module.feature_info] == sides
    with pytest.raises(kdkit.TapError, match=f"no layer 'stage{len(stages) + 1}'"):
        build(name, weights=False, layers=[f"stage{len(stages) + 1}"])


@pytest.mark.parametrize(("name", "pairs"), PREACTIVATIONS.items())
def test_preactivations(name, pairs):
    model = build(name, layers=[layer for layer, _ in pairs])
    context = kdkit.Context(model.module, model.module, 100, 0, torch.empty(0))
    for norm in (part for part in model.module.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    features = model(images(model)).features
    for layer, norm in pairs:
        assert features[layer].min() < -0.1
        assert context.teacher_norm(layer) is model.module.get_submodule(norm)


@pytest.mark.first(6)
@pytest.mark.parametrize("name", PARAMETERS)
def test_no_layer_is_overwritten(name):
    every = [path for path, part in build(name, weights=False).module.named_modules() if path and not isinstance(part, nn.ModuleList)]
    model = build(name, weights=False)
    ran = []
    for path in every:
        model.module.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    model(images(model))
    build(name, weights=False, layers=ran)(images(model))


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"])
def test_as_any_network_of_timm(name):
    build(name, weights=False)
    model = timm.create_model(f"cifar_{name}", num_classes=7).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        embedding = model.forward_head(features, pre_logits=True)
        assert embedding.shape == (2, model.num_features) and features.shape[:2] == embedding.shape
        assert torch.equal(model.forward_head(features), model(x)) and model(x).shape == (2, 7)
        torch.testing.assert_close(model.get_classifier()(embedding), model(x))
        model.reset_classifier(5)
        assert model(x).shape == (2, 5) and model.num_classes == 5
        model.reset_classifier(0)
        assert torch.equal(model(x), embedding)
    maps = timm.create_model(f"cifar_{name}", features_only=True, out_indices=(0, 1, 2))
    assert [value.shape[1] for value in maps(x)] == maps.feature_info.channels() == [entry["num_chs"] for entry in model.feature_info[:3]]
    assert f"{model.pretrained_cfg['classifier']}.weight" in timm.create_model(f"cifar_{name}").state_dict()


def test_weights_are_drawn_as_in_the_code_bases():
    torch.manual_seed(0)
    for name, path, linear in (
        ("resnet8x4", "layer3.0.conv2", None),
        ("vgg8", "block3.0", 0.01),
        ("wrn_40_2", "block3.layer.1.conv1", None),
    ):
        module = build(name).module
        conv = module.get_submodule(path)
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.02)
        assert conv.bias is None or not conv.bias.any()
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        assert all(norm.weight.eq(1).all() and not norm.bias.any() for norm in norms)
        if linear:
            assert module.get_classifier().weight.std().item() == pytest.approx(linear, rel=0.02) and not module.get_classifier().bias.any()


def test_stages_of_shuffle_blocks_are_activated_as_published():
    """The second version activates one half of the channels; the half that passes by is positive already."""
    module = build("shufflenet_v2", layers=["layer1.0"]).module.eval()
    block, x = module.layer1[1], module.layer1[0](torch.rand(2, 24, 32, 32))
    kept, half = x[:, :58], x[:, 58:]
    half = block.bn2(block.conv2(block.bn1(block.conv1(half)).relu()))
    joined = torch.cat([kept, block.bn3(block.conv3(half)).relu()], 1)
    order = [i // 2 + 58 * (i % 2) for i in range(116)]
    torch.testing.assert_close(block(x), joined[:, order])


def test_larger_images_and_other_channels():
    vgg = build("vgg8", shape=(1, 64, 64), layers=["stage3", "stage4"], weights=False)
    features = vgg(images(vgg, shape=(1, 64, 64))).features
    assert [features[name].shape[2] for name in ("stage3", "stage4")] == [8, 4]
    assert build("resnet8", shape=(1, 28, 28))(torch.rand(2, 1, 28, 28)).logits.shape == (2, 100)


def test_inputs_are_normalised_as_in_the_code_bases():
    out = build("resnet8").adapt(torch.zeros(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([-0.5071 / 0.2675, -0.4867 / 0.2565, -0.4408 / 0.2761]))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet21", {}, "no 'cifar/resnet21'; did you mean one of: .*resnet20"),
        ("vgg8", {"shortcut": "pad"}, "`shortcut: pad` is for the ResNets, not for 'vgg8'"),
    ],
)
def test_mistakes_are_one_line(name, options, says):
    with pytest.raises(kdkit.ModelError, match=says):
        build(name, weights=False, **options)


@pytest.mark.parametrize("layout", ["mdistiller", "shortcut and linear", "akamaster"])
def test_public_layouts_load_as_they_are(tmp_path, layout):
    options = {"shortcut": "pad", "strip_prefix": "module."} if layout == "akamaster" else {}
    original = build("resnet14", 10, **{key: value for key, value in options.items() if key == "shortcut"}).module
    state = copy.deepcopy(original.state_dict())
    if layout != "mdistiller":
        state = {key.replace("fc.", "linear.").replace("downsample", "shortcut"): value for key, value in state.items()}
    if layout == "akamaster":
        state = {f"module.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        assert not any("shortcut" in key for key in state)
    torch.save({"model" if layout == "mdistiller" else "state_dict": state, "best": 93.4, "epoch": 240}, tmp_path / "weights.pth")
    loaded = build("resnet14", 10, checkpoint=tmp_path / "weights.pth", **options).module.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in original.state_dict().items())


def test_a_checkpoint_of_the_other_shortcut_is_refused(tmp_path):
    torch.save(build("resnet14").module.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(kdkit.ModelError, match="12 keys unexpected .layer2.0.downsample"):
        build("resnet14", checkpoint=tmp_path / "weights.pth", shortcut="pad")


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AKAMASTER = {"shortcut": "pad", "strip_prefix": "module.", "normalize": IMAGENET}
PUBLIC = [
    ("resnet56", 100, "cifar100_resnet56/cifar100_resnet56-f2eff4c8.pt", 72.63, 356, {"normalize": {"mean": (0.5070, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2761)}}),
    ("resnet20", 10, "cifar10_resnet/resnet20-12fca82f.th", 91.73, 455, AKAMASTER),
    ("resnet32", 10, "cifar10_resnet/resnet32-d509ac18.th", 92.63, 466, AKAMASTER),
    ("resnet44", 10, "cifar10_resnet/resnet44-014dd654.th", 93.11, 465, AKAMASTER),
    ("resnet56", 10, "cifar10_resnet/resnet56-4bfd9763.th", 93.39, 470, AKAMASTER),
]  # fmt: skip


def right(monkeypatch, name, classes, file, options, count):
    """How many of the first test images a public network gets right."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [])  # so that a folder with the test part alone will do
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", None]])
    test = (Cifar100 if classes == 100 else Cifar10)(SmallSetOptions(root=DATA)).split("test")
    model = build(name, classes, checkpoint=WEIGHTS / file, **options).freeze()
    batches = zip(test.images[:count].split(500), test.labels[:count].split(500), strict=True)
    return sum((model(x.float() / 255).logits.argmax(1) == y).sum().item() for x, y in batches)


@real
@pytest.mark.parametrize(("name", "classes", "file", "top1", "first", "options"), PUBLIC)
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")  # the original pickles and NumPy 2.4
def test_public_weights_on_a_few_images(monkeypatch, name, classes, file, top1, first, options):
    assert abs(right(monkeypatch, name, classes, file, options, 500) - first) <= 1  # another machine may round one image over the edge


@real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes", "file", "top1", "first", "options"), PUBLIC)
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")
def test_public_weights_reach_their_published_accuracy(monkeypatch, name, classes, file, top1, first, options):
    assert right(monkeypatch, name, classes, file, options, 10_000) / 100 == pytest.approx(top1, abs=0.011)
