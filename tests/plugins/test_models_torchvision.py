import pytest
import torch
import torchvision

import kdkit
from kdkit.models.build import build_model
from kdkit.recipe import registry

SOURCE = registry.load().models["torchvision"]


def build(name, classes=10, weights=True, **options):
    source = SOURCE(SOURCE.Options(model=f"torchvision/{name}", **options), name)
    return build_model(
        source.options, source, classes, (1, 32, 32), ["stage2", "penultimate"] if name == "resnet18" else [], weights=weights
    )


def test_builds_with_stages_and_its_own_normalisation():
    model = build("resnet18")
    out = model(torch.rand(2, 1, 32, 32))
    assert out.logits.shape == (2, 10)
    assert out.features["stage2"].shape == (2, 128, 4, 4)
    assert out.features["penultimate"].shape == (2, 512)
    expected = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(model.adapt(torch.zeros(1, 1, 1, 1)).flatten(), expected)


def fake_download(monkeypatch, state):
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **options: state)


def test_pretrained_weights_without_the_classifier_of_others(monkeypatch):
    torch.manual_seed(1)
    trained = torchvision.models.resnet18().state_dict()
    fake_download(monkeypatch, trained)
    for classes in (10, 1000):
        state = build("resnet18", classes, pretrained=True).module.state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in state.items() if value.shape == trained[key].shape)
        assert state["fc.weight"].shape == (classes, 512)
    with pytest.raises(kdkit.ModelError, match="do not fit these arguments: "):
        build("resnet18", pretrained=True, args={"norm_layer": torch.nn.Identity})


def test_failed_download_is_one_line(monkeypatch):
    def fail(self, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(kdkit.ModelError, match="cannot be fetched: no network; `pretrained: false` begins"):
        build("resnet18", pretrained=True)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [("resnt18", {}, "did you mean one of: resnet18"), ("resnet18", {"depth": 3}, "cannot build 'resnet18': .*depth")],
)
def test_mistakes_are_one_line(name, args, says):
    with pytest.raises(kdkit.ModelError, match=says):
        build(name, args=args, weights=False)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("squeezenet1_1", {"dropout": 0.1}),
        ("lraspp_mobilenet_v3_large", {}),
        ("ssdlite320_mobilenet_v3_large", {"norm_layer": None}),
    ],
)
def test_torchvision_builds_what_was_exported_by_the_words_of_the_export(name, args):
    source = SOURCE(SOURCE.Options(model=f"torchvision/{name}", args=args), name)
    module = source.build(7, (3, 64, 64))
    made = source.portable(module)
    code = made.how.format(folder="runs/a", outputs=7).removeprefix("build it by ").split(", and load into it")
    again = eval(code[0], {"torchvision": torchvision})
    again.load_state_dict(module.state_dict())
    assert ("normalises images itself" in code[1]) == hasattr(again, "transform")
    assert 'load_file("runs/a/model.safetensors")' in code[1]
