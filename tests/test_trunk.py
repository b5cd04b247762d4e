"""A trunk that is computed once gives what whole networks give."""

import copy

import pytest
import timm
import torch
from torch import nn

import kdkit
from kdkit.models.tapped import TappedModel

FAMILIES = {
    "test_resnet": "stage2",
    "test_vit": "blocks.1",
    "test_efficientnet": "stage2",
    "test_convnext": "stage2",
    "test_mambaout": "stage2",
    "test_nfnet": "stage2",
    "test_vit3": "blocks.1",
    "mobilenetv3_small_050": "stage2",
    "swin_tiny_patch4_window7_224": "stage2",
    "densenet121": "features.denseblock2",
    "mixer_s32_224": "blocks.3",
}
SMALL = {
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2},
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64},
}


def students(name, count, taps=()):
    arguments = {**SMALL.get(name, {})}
    found = []
    for _ in range(count):
        network = timm.create_model(name, num_classes=5, **arguments)
        size = network.pretrained_cfg["input_size"][1:]
        side = arguments.get("img_size") or min(size[0], 64 if "vit" not in name else size[0])
        found.append(TappedModel(network, taps, input_shape=(3, side, side)))
    return found


def gradients(network, total):
    network.zero_grad(set_to_none=True)
    total.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_gradients_of_a_trunk_are_those_of_whole_networks(name):
    torch.manual_seed(0)
    models = students(name, 3)
    trunk = kdkit.Trunk(models, FAMILIES[name])
    assert trunk.once, "the trunk would be computed for each branch"
    images = torch.rand(4, *models[0].input_shape)
    everything = nn.ModuleList(model.module for model in models)
    shared = {id(p) for p in models[0].module.parameters()} & {id(p) for p in models[1].module.parameters()}
    assert 0 < len(shared) < len(list(models[0].module.parameters()))
    everything.eval()
    weigh = [torch.randn(4, 5) for _ in models]
    _, answers = trunk(images)
    ours = gradients(everything, sum((w * answer.logits).sum() for w, answer in zip(weigh, answers, strict=True)))
    whole = [model.module(images) for model in models]
    theirs = gradients(everything, sum((w * z).sum() for w, z in zip(weigh, whole, strict=True)))
    for answer, z in zip(answers, whole, strict=True):
        torch.testing.assert_close(answer.logits, z, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1), msg=key)


def test_statistics_of_the_trunk_move_once_a_batch():
    models = students("test_resnet", 2)
    trunk = kdkit.Trunk(models, "stage2")
    alone = copy.deepcopy(models[0].module)
    for model in models:
        model.module.train()
    images = torch.rand(4, *models[0].input_shape)
    _, answers = trunk(images)
    torch.testing.assert_close(answers[0].logits, alone.train()(images))
    for name, value in alone.named_buffers():
        torch.testing.assert_close(dict(models[0].module.named_buffers())[name], value)
    assert all(part.training for model in models for part in model.module.modules())
    after = models[1].module.eval()(images), models[0].module.eval()(images)
    assert after[0].shape == after[1].shape and not torch.equal(*after)


def test_tapped_layers_of_the_trunk_are_shown_whole():
    taps = ("stage1", "stage2", "stage3", "stage3@input", "penultimate", "logits")
    models = students("test_resnet", 2, taps)
    trunk = kdkit.Trunk(models, "stage2")
    images = torch.rand(4, *models[0].input_shape)
    for model in models:
        model.module.eval()
    given, (first, second) = trunk(images)
    assert torch.equal(given, first.features["stage2"])
    whole = models[1](images)
    for name in taps:
        torch.testing.assert_close(second.features[name], whole.features[name])
    assert second.features["logits"] is second.logits


def test_state_of_a_trunk_is_whole_for_each_student():
    models = students("test_vit", 2)
    kdkit.Trunk(models, "blocks.1")
    for model in models:
        fresh = students("test_vit", 1)[0].module
        fresh.load_state_dict(model.module.state_dict())
        images = torch.rand(2, *model.input_shape)
        torch.testing.assert_close(fresh.eval()(images), model.module.eval()(images))


class LooksBack(nn.Module):
    """Adds the images' mean and their number behind its layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.two(self.one(x.flatten(1)).relu()) + x.mean() * len(x)


class Twice(LooksBack):
    """Runs its first layer two times."""

    def forward(self, x):
        return self.two(self.one(x.flatten(1)) + self.one(x.flatten(1)))


def test_a_network_without_a_trunk_runs_whole():
    models = [TappedModel(LooksBack(), input_shape=(3, 2, 2)) for _ in range(2)]
    trunk = kdkit.Trunk(models, "one")
    assert not trunk.once
    images = torch.rand(4, 3, 2, 2)
    _, answers = trunk(images)
    for model, answer in zip(models, answers, strict=True):
        torch.testing.assert_close(answer.logits, model.module(images))
    assert models[0].module.one.weight is models[1].module.one.weight


@pytest.mark.parametrize(
    ("kind", "layer", "says"),
    [
        (Twice, "one", "runs 2 times"),
        (LooksBack, "two", "nothing that learns lies behind"),
        (LooksBack, "two@input", "ends behind a layer"),
    ],
)
def test_where_no_trunk_can_end(kind, layer, says):
    with pytest.raises(kdkit.TapError, match=says):
        kdkit.Trunk([TappedModel(kind(), input_shape=(3, 2, 2)) for _ in range(2)], layer)


def test_compiled_networks_run_whole():
    models = [TappedModel(LooksBack(), input_shape=(3, 2, 2)).compile(backend="eager") for _ in range(2)]
    assert not kdkit.Trunk(models, "one").once


def test_channels_of_a_layer():
    (model,) = students("test_resnet", 1, ("stage2", "penultimate"))
    answer = model(torch.rand(2, *model.input_shape))
    assert [kdkit.channels(model, name) for name in ("stage2", "penultimate")] == [answer.features[name].shape[1] for name in model.layers]
