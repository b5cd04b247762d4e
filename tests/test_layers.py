import pytest
import timm
import torch
import torchvision
from torch import nn

import kdkit
from kdkit.contracts.layer_rows import tappable_layers
from kdkit.contracts.layers import Layer, classifier_path, expand, expand_pairs, norm_path, resolve, stage_paths


def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "regnetx_002": ["s1", "s2", "s3", "s4"],
    "efficientnet_b0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "tf_efficientnetv2_b0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
    "vgg11": ["features.1", "features.4", "features.9", "features.14", "features.19", "features.20"],
    "test_vit": [f"blocks.{i}" for i in range(6)],
    "swin_tiny_patch4_window7_224": ["layers.0", "layers.1", "layers.2", "layers.3"],
    "test_nfnet": ["stages.0", "stages.1", "stages.2", "final_conv"],
    "resnetv2_50": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "xception41": ["blocks.0.stack.act3", "blocks.1.stack.act3", "blocks.2.stack.act3", "blocks.11.stack.act3", "blocks.12"],
    "dla34": ["level2", "level3", "level4", "level5"],
    "visformer_tiny": ["stage1", "stage2", "stage3"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_timm_families(name):
    module = meta(name)
    assert stage_paths(module) == STAGES[name]
    for number, path in enumerate(STAGES[name], 1):
        assert resolve(f"stage{number}", module) == Layer(path)


def test_stages_of_other_networks():
    assert stage_paths(torchvision.models.resnet18()) == ["layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(kdkit.TapError, match="does not say what its stages are; name a layer: features, classifier"):
        resolve("stage1", torchvision.models.mobilenet_v2())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet", "test_byobnet", "test_nfnet"])
def test_penultimate_is_the_pooled_embedding(name):
    module = timm.create_model(name, num_classes=7).eval()
    out = kdkit.taps(module, ["penultimate"])(torch.rand(2, 3, 160, 160))
    embedding = out.features["penultimate"]
    assert embedding.shape == (2, module.head_hidden_size)
    torch.testing.assert_close(module.get_classifier()(embedding), out.logits)


def test_penultimate_before_a_convolution():
    module = timm.create_model("resnetv2_50", num_classes=5, layers=(1, 1, 1, 1)).eval()
    assert isinstance(module.get_classifier(), nn.Conv2d)
    assert kdkit.taps(module, ["penultimate"])(torch.rand(2, 3, 32, 32)).features["penultimate"].shape == (2, 2048)


def test_penultimate_of_other_networks():
    net = nn.ModuleDict({"fc": nn.Linear(4, 10), "auxiliary": nn.Linear(4, 3)})
    assert classifier_path(net, outputs=10) == "fc"
    assert classifier_path(net) == "auxiliary"
    assert classifier_path(torchvision.models.mobilenet_v2()) == "classifier.1"
    with pytest.raises(kdkit.TapError, match="no linear classifier"):
        classifier_path(torchvision.models.squeezenet1_0())
    with pytest.raises(kdkit.TapError, match="several classifiers"):
        classifier_path(meta("levit_128s"))


def test_unknown_layer_says_what_there_is():
    module = meta("resnet18")
    with pytest.raises(kdkit.TapError) as caught:
        resolve("layer2.0.cnov1", module)
    assert "did you mean 'layer2.0.conv1'?" in str(caught.value)
    assert "stage4" in str(caught.value)
    assert "layer3.0" not in str(caught.value)
    for name in ("stage5", "stage0", "", "nonsense"):
        with pytest.raises(kdkit.TapError, match="there is no layer"):
            resolve(name, module)


def test_globs_follow_the_network():
    module = meta("deit_tiny_patch16_224")
    assert expand("blocks.*.attn", module) == [f"blocks.{i}.attn" for i in range(12)]  # 10 after 9, not after 1
    assert expand("blocks.[02].mlp.fc?", module) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2"]
    assert expand("stage*", meta("convnext_atto")) == ["stage1", "stage2", "stage3", "stage4"]
    assert expand("penultimate", module) == ["penultimate"]
    with pytest.raises(kdkit.TapError, match=r"no layer matches 'blokcs\.\*'"):
        expand("blokcs.*", module)
    with pytest.raises(kdkit.TapError, match="there is no layer"):
        expand("blocks.99", module)


def test_pairs_go_together_in_order():
    student, teacher = meta("test_vit"), meta("test_vit2")
    pairs = expand_pairs(
        [kdkit.LayerPair(student="blocks.*", teacher="blocks.[0-5]"), kdkit.LayerPair(student="logits", teacher="head")], student, teacher
    )
    assert [(pair.student, pair.teacher) for pair in pairs] == [*((f"blocks.{i}",) * 2 for i in range(6)), ("logits", "head")]
    with pytest.raises(kdkit.TapError) as caught:
        expand_pairs([kdkit.LayerPair(student="blocks.*", teacher="blocks.[01]")], student, teacher)
    assert "6 student layers" in str(caught.value)
    assert "(blocks.0, blocks.1)" in str(caught.value)


def test_listing_gives_shapes_without_moving_anything():
    module = timm.create_model("test_resnet", num_classes=7)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    rows = {row.name: row for row in tappable_layers(module, (3, 32, 32))}
    assert rows["layer1"].shape == (2, 32, 8, 8)
    assert rows["layer1"].aliases == ("stage1",)
    assert rows["layer1"].type == "Sequential"
    assert rows[""].shape == (2, 7)
    assert rows[""].aliases == ("logits",)
    assert (rows["fc@input"].shape, rows["fc@input"].aliases) == ((2, 96), ("penultimate",))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training
    assert not any(part._forward_hooks for part in module.modules())


class NeedsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)

    def forward(self, x):
        return self.body(x.flatten(1)) * float(x.sum() + 1)


def test_listing_falls_back_to_zeros():
    rows = tappable_layers(NeedsData(), (1, 2, 2))
    assert [(row.name, row.shape) for row in rows] == [("", (2, 5)), ("body", (2, 5)), ("body@input", (2, 4))]
    with pytest.raises(kdkit.TapError, match="does not take images"):
        tappable_layers(NeedsData(), (1, 3, 3))


def test_the_input_of_a_layer():
    module = meta("resnet18")
    assert resolve("layer1.0.act2@input", module) == Layer("layer1.0.act2", "input")
    assert resolve("stage2@input", module) == Layer("layer2", "input")
    assert expand("layer1.*.act2@input", module) == ["layer1.0.act2@input", "layer1.1.act2@input"]
    with pytest.raises(kdkit.TapError, match="there is no layer 'layer9'"):
        resolve("layer9@input", module)


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        ("layer1.0.act1@input", "layer1.0.bn1"),
        ("layer1.0.act2@input", "layer1.0.bn2"),
        ("layer2.0.act2@input", "layer2.0.bn2"),  # and not the shortcut's
        ("layer2.0.downsample.1", "layer2.0.downsample.1"),
        ("layer2.0.bn1", "layer2.0.bn1"),
    ],
)
def test_the_norm_that_a_layers_values_come_from(layer, norm):
    assert norm_path(layer, meta("resnet18")) == norm


@pytest.mark.parametrize("layer", ["layer1", "conv1@input", "layer1.0.conv1", "penultimate"])
def test_no_norm_is_guessed(layer):
    with pytest.raises(kdkit.TapError, match="name one, or the input of the activation"):
        norm_path(layer, meta("resnet18"))


def test_no_norm_is_guessed_for_an_activation_that_runs_twice():
    with torch.device("meta"):
        basic, bottleneck = torchvision.models.resnet18(), torchvision.models.resnet50()
    with pytest.raises(kdkit.TapError, match="several times.*: 'layer1.0.bn1', 'layer1.0.bn2'"):
        norm_path("layer1.0.relu@input", basic)
    assert norm_path("layer1.0.relu@input", bottleneck) == "layer1.0.bn3"  # the last run's, which is what a tap gives
    assert norm_path("relu@input", basic) == "bn1"


def test_no_norm_is_taken_from_behind_a_convolution():
    module = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    with pytest.raises(kdkit.TapError, match="no batch norm is known to give '2@input'"):
        norm_path("2@input", module)


def test_a_norm_that_activates_has_its_values_before_the_activation():
    module = meta("mobilenetv2_050")
    with pytest.raises(kdkit.TapError, match="behind its activation; take 'bn2.act@input'"):
        norm_path("bn2", module)
    assert norm_path("bn2.act@input", module) == "bn2"
    assert norm_path("blocks.1.0.bn3", module) == "blocks.1.0.bn3"
