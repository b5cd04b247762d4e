import pytest
import timm
import torch
from safetensors.torch import save_file

import kdkit
from kdkit.models.build import build_model
from kdkit.recipe import registry

TIMM = registry.load().models["timm"]
PILOT = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "zero_init_last": False}


def build(name, shape=(3, 32, 32), classes=10, layers=(), weights=True, **options):
    source = TIMM(TIMM.Options(model=name, **options), name)
    return build_model(source.options, source, classes, shape, layers, weights=weights)


def count(model):
    return sum(value.numel() for value in model.module.parameters())


@pytest.mark.parametrize(("channels", "parameters"), [([16, 32, 64, 128], 308_538), ([4, 8, 16, 32], 19_830)])
def test_small_stem_sizes(channels, parameters):
    model = build("resnet18", (1, 8, 8), stem="small", args={**PILOT, "channels": channels}, layers=["stage1", "stage2", "penultimate"])
    assert count(model) == parameters
    shapes = {name: tuple(value.shape) for name, value in model(torch.rand(2, 1, 8, 8)).features.items()}
    assert shapes == {"stage1": (2, channels[0], 8, 8), "stage2": (2, channels[1], 4, 4), "penultimate": (2, channels[3])}
    assert [entry["reduction"] for entry in model.module.feature_info] == [1, 1, 2, 4, 8]
    assert "zero_init_last" not in model.module.__dict__
    assert model.module.layer1[0].bn2.weight.all()


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "skresnet18", "resnetblur18"])
def test_small_stem_of_the_family(name):
    model = build(name, stem="small", layers=["stage1"], weights=False)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).features["stage1"].shape[2:] == (32, 32)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("efficientnet_b0", {"stem": "small"}, "`stem: small` is for timm's ResNet family, which 'efficientnet_b0' is not in"),
        ("resnet18", {"stem": "small", "pretrained": True}, "leave out `stem: small`"),
        ("resnet18", {"stem": "small", "args": {"channels": [5, 8, 8, 8]}}, "even number of first channels, got 5"),
        ("resnet18", {"args": {"chanels": 3}}, "cannot build 'resnet18': TypeError: .*chanels"),
        ("resnet18.nonsense", {"pretrained": True}, "Invalid pretrained tag"),
        ("resnet81", {}, "timm has no model 'resnet81'; did you mean one of: .*resnet"),
        ("torchvison/resnet18", {}, "timm has no model 'torchvison/resnet18'"),
    ],
)
def test_mistakes_are_one_line(name, options, says):
    with pytest.raises(kdkit.ModelError, match=says) as caught:
        build(name, weights=False, **options)
    assert "\n" not in str(caught.value)


def test_normalisation_is_the_models_own():
    model = build("test_vit", weights=False)
    config = model.module.pretrained_cfg
    source = TIMM(TIMM.Options(model="test_vit"), "test_vit")
    assert source.normalization(model.module) == kdkit.Normalize(mean=config["mean"], std=config["std"])
    model.module.pretrained_cfg = {}
    assert source.normalization(model.module) is None


def test_channels_are_the_arguments_the_weights_or_the_images():
    for options, channels in (({}, 1), ({"pretrained": True}, 3), ({"args": {"in_chans": 4}}, 4)):
        assert TIMM(TIMM.Options(model="resnet18", **options), "resnet18").in_channels(1) == channels
    assert build("test_resnet", (1, 32, 32), weights=False, args={"in_chans": 3}).input_shape == (3, 32, 32)


@pytest.mark.parametrize("overlay", [{}, {"num_classes": 1000}])
@pytest.mark.parametrize(("classes", "same_head"), [(1000, True), (2, False)])
def test_pretrained_weights(tmp_path, classes, same_head, overlay):
    torch.manual_seed(1)
    trained = timm.create_model("test_resnet").state_dict()
    save_file(trained, tmp_path / "w.safetensors")
    torch.manual_seed(2)
    source = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors"), **overlay}}
    found = build("test_resnet", (1, 32, 32), classes, pretrained=True, args=source)
    state = found.module.state_dict()
    assert found.input_shape == (3, 32, 32)
    assert all(torch.equal(value, trained[key]) for key, value in state.items() if not key.startswith("fc."))
    assert state["fc.weight"].shape[0] == classes
    assert (state["fc.weight"].shape == trained["fc.weight"].shape and torch.equal(state["fc.weight"], trained["fc.weight"])) is same_head


def test_a_local_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(kdkit.ModelError, match="args.pretrained_cfg_overlay.file: no such file: .*absent.safetensors") as caught:
        build("test_resnet", classes=2, pretrained=True, args={"pretrained_cfg_overlay": {"file": str(tmp_path / "absent.safetensors")}})
    assert "\n" not in str(caught.value)
