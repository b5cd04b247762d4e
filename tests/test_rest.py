"""What stands behind a layer: the network's own answer to the layer's own values, and its gradient; refusals."""

import copy

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import kdkit
from kdkit.models.rest import Rest
from kdkit.models.tapped import TappedModel

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, layers=[1, 1, 1, 1], num_classes=5, channels=(4, 6, 8, 10))


def swin():
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=5
    )


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5)


def of(network, *given, **options):
    return Rest(TappedModel(network, input_shape=(3, 32, 32), role="teacher", **options), *given)


CASES = [
    (resnet, "stage2", ["stage3", "stage4"]),
    (resnet, "conv1", []),
    (swin, "stage1", ["stage2"]),
    (vit, "blocks.0", ["blocks.1", "norm"]),
]


@pytest.mark.parametrize(("make", "layer", "taps"), CASES)
def test_the_layers_own_values_have_the_networks_own_answer_and_gradient(make, layer, taps):
    network = make().eval()
    whole = kdkit.taps(network, [layer, *taps])(IMAGES)
    values = whole.features[layer]
    found = of(network, layer, taps)(values)
    torch.testing.assert_close(found.logits, whole.logits)
    for name in taps:
        torch.testing.assert_close(found.features[name], whole.features[name])
    weights = torch.arange(whole.logits.numel()).view_as(whole.logits)
    behind = [p for p in network.parameters() if p.requires_grad]
    slopes = [
        torch.autograd.grad((x.logits * weights).sum(), [values, *behind], allow_unused=True, retain_graph=True) for x in (found, whole)
    ]
    for ours, theirs in zip(*slopes, strict=True):
        # what stands before the layer learns through the values alone, and of Swin they are another view
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs)
    assert slopes[0][0].any() and sum(ours is not None for ours in slopes[0]) > 4


def test_other_values_of_any_number_pass_through():
    network = resnet().eval().requires_grad_(False)
    behind = of(network, "stage3", ["stage4"])
    values = torch.randn(7, 8, 2, 2, requires_grad=True)
    answer = behind(values)
    expected = network.layer4(values)
    torch.testing.assert_close(answer.features["stage4"], expected)
    torch.testing.assert_close(answer.logits, network.fc(expected.mean((2, 3))))
    answer.logits.sum().backward()
    assert values.grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_a_network_keeps_its_state(training):
    network = resnet().train(training)
    before, modes = copy.deepcopy(network.state_dict()), [part.training for part in network.modules()]
    of(network, "stage2")(torch.randn(4, 6, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert modes == [part.training for part in network.modules()]
    assert all(part.track_running_stats for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    assert not any(part._forward_hooks for part in network.modules()) and torch.is_grad_enabled()


def test_norms_that_are_trained_use_the_statistics_of_the_values():
    network = resnet().train()
    values = 5 + torch.randn(8, 8, 2, 2)
    expected = copy.deepcopy(network).layer4(values)
    torch.testing.assert_close(of(network, "stage3", ["stage4"])(values).features["stage4"], expected)


def test_without_gradient_there_is_none():
    values = torch.randn(2, 6, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not of(resnet().eval(), "stage2")(values).logits.requires_grad


def test_an_error_behind_the_layer_leaves_no_hook():
    network = resnet().eval()
    behind = of(network, "stage2")
    with pytest.raises(RuntimeError):
        behind(torch.randn(2, 7, 4, 4))
    assert torch.is_grad_enabled() and not any(part._forward_hooks for part in network.modules())


def test_without_weights_shapes_are_known():
    network = resnet().eval().to("meta")
    answer = of(network, "stage2", ["stage4"])(torch.empty(9, 6, 4, 4, device="meta"))
    assert answer.logits.shape == (9, 5) and answer.features["stage4"].shape == (9, 10, 1, 1)


class Skipping(nn.Module):
    """Adds what it had before `second` to what it gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, images):
        x = self.first(images)
        return self.head((x + self.second(x)).mean((2, 3)))


class Twice(nn.Module):
    """Runs a layer twice."""

    def __init__(self):
        super().__init__()
        self.again, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, images):
        return self.head(self.again(self.again(images).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "layer", "says"),
    [
        (Skipping(), "second", "also reads what stands before it"),
        (resnet(), "layer1.0.conv1", "also reads what stands before it"),
        (resnet(), "stage2@input", "in the place of a layer's output"),
        (resnet(), "logits", "in the place of a layer's output"),
        (resnet(), "stage9", "there is no layer 'stage9'"),
    ],
)
def test_refuses(network, layer, says):
    with pytest.raises(kdkit.TapError, match=says):
        of(network.eval(), layer)


def test_a_layer_that_runs_twice_is_given_its_last_values_twice():
    """Its last output is what is tapped; nothing else depends on the first."""
    network = Twice().eval()
    whole = kdkit.taps(network, ["again"])(IMAGES)
    torch.testing.assert_close(of(network, "again")(whole.features["again"]).logits, whole.logits)


def test_refuses_texts_and_networks_of_unknown_shape():
    with pytest.raises(kdkit.TapError, match="images of a known shape"):
        Rest(TappedModel(resnet()), "stage2")


def test_a_context_without_the_engine_does_not_know():
    context = kdkit.Context(resnet(), resnet(), 5, 0, torch.empty(0))
    for ask in (context.teacher_rest, context.student_rest):
        with pytest.raises(kdkit.TapError, match="what stands behind 'stage2' is not known"):
            ask("stage2")
    known = kdkit.Context(resnet(), None, 5, 0, torch.empty(0), lambda network, layer, taps: of(network.eval(), layer, taps))
    assert known.student_rest("stage2")(torch.randn(2, 6, 4, 4)).logits.shape == (2, 5)
    with pytest.raises(kdkit.TapError, match="no teacher network"):
        known.teacher_rest("stage2")
