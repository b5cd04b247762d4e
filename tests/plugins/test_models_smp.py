"""segmentation-models-pytorch, and torchvision's networks of segmentation, as model sources."""

import pytest
import torch

from kdkit.contracts.layers import outputs_of, stage_paths
from kdkit.errors import ModelError
from kdkit.recipe import registry

MODELS = registry.load().models
SMALL = {"channels": [8, 8, 8, 8], "stem_width": 8}


def made(name, **options):
    source, _, model = name.partition("/")
    return MODELS[source](MODELS[source].Options(model=name, **options), model)


@pytest.mark.parametrize(
    ("decoder", "args"),
    [("deeplabv3plus", {"decoder_channels": 8}), ("fpn", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32})],
)
def test_a_decoder_on_a_backbone_of_timm(decoder, args):
    pytest.importorskip("segmentation_models_pytorch")
    network = made(f"smp/{decoder}", encoder="resnet10t", args={**SMALL, **args}).build(5, (1, 32, 32))
    assert network.eval()(torch.rand(2, 1, 32, 64)).shape == (2, 5, 32, 64)
    assert stage_paths(network) == [f"encoder.model.layer{i}" for i in range(1, 5)]
    assert all(network.get_submodule(path) for path in stage_paths(network))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("smp/unett", {"encoder": "resnet18"}, "smp has no decoder 'unett'; did you mean one of: unet"),
        ("smp/fpn", {"encoder": "resnett18"}, "encoder: timm has no backbone 'resnett18'; did you mean one of: resnet18, "),
        ("smp/fpn", {"encoder": "mlp_mixer:nowhere"}, "smp cannot build 'fpn' with the encoder 'mlp_mixer:nowhere'"),
        ("smp/fpn", {"encoder": "resnet10t", "args": {"wrong": 1}}, "smp cannot build 'fpn'"),
    ],
)
def test_what_smp_cannot_build_is_told(name, options, says):
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ModelError, match=says) as error:
        made(name, **options).build(3, (3, 32, 32))
    assert "\n" not in str(error.value)


def test_the_extra_is_named_where_smp_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(ModelError, match=r"pip install 'kdkit\[segmentation\]'"):
        made("smp/fpn", encoder="resnet18").build(3, (3, 32, 32))


def test_torchvision_s_networks_of_segmentation():
    with torch.device("meta"):
        network = made("torchvision/fcn_resnet50", args={"aux_loss": True}).build(5, (3, 64, 64))
        outputs = outputs_of(network.eval()(torch.rand(2, 3, 64, 64)))
    assert [output.shape for output in outputs] == [(2, 5, 64, 64)] * 2
    assert stage_paths(network) == [f"backbone.layer{i}" for i in range(1, 5)]


@pytest.mark.parametrize("fits", [True, False])
def test_torchvision_s_weights_leave_out_heads_of_other_classes_and_the_auxiliary_one(fits, monkeypatch):
    source = made("torchvision/fcn_resnet50", pretrained=True)
    with torch.device("meta"):
        donor = made("torchvision/fcn_resnet50", args={"aux_loss": True}).build(21, (3, 64, 64)).state_dict()
        network = source.build(5, (3, 64, 64))
    if not fits:
        for name in ("conv1", "layer1.0.conv1"):
            donor[f"backbone.{name}.weight"] = donor[f"backbone.{name}.weight"][:1]
    monkeypatch.setattr(source, "_weights", lambda: type("Weights", (), {"get_state_dict": lambda *_, **__: donor})())
    if fits:
        source.load(network)
    else:
        with pytest.raises(ModelError, match="do not fit these arguments"):
            source.load(network)
