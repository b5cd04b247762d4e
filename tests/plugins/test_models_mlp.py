import pytest
import torch

import kdkit
from kdkit.models.build import build_model
from kdkit.recipe import registry

MLP = registry.load().models["mlp"]


def build(name, shape=(1, 28, 28), layers=(), **options):
    source = MLP(MLP.Options(model=f"mlp/{name}", **options), name)
    return build_model(source.options, source, 10, shape, layers)


@pytest.mark.parametrize(("name", "parameters"), [("1200-1200", 2_395_210), ("800-800", 1_276_810), ("5", 784 * 5 + 5 + 60)])
def test_sizes(name, parameters):
    assert sum(value.numel() for value in build(name).module.parameters()) == parameters


def test_the_tutorial_s_student_has_53_percent_of_its_teacher():
    student, teacher = (sum(p.numel() for p in build(name).module.parameters()) for name in ("800-800", "1200-1200"))
    assert f"{100 * student / teacher:.3f}" == "53.307"


def test_layers_and_activation():
    model = build("7-5", (3, 4, 4), ["stage1", "layer2", "penultimate"], activation="tanh")
    out = model(torch.rand(2, 3, 4, 4))
    assert [tuple(value.shape) for value in out.features.values()] == [(2, 7), (2, 5), (2, 5)]
    assert torch.equal(out.features["layer2"], torch.tanh(model.module.layer2[0](out.features["stage1"])))


def test_dropout_is_the_options():
    model = build("1000", dropout=0.5, input_dropout=0.2, layers=["layer1", "input_dropout"])
    torch.manual_seed(0)
    features = model(torch.ones(4, 1, 28, 28)).features
    assert float((features["input_dropout"] == 0).float().mean()) == pytest.approx(0.2, abs=0.05)
    assert float((features["layer1"] == 0).float().mean()) == pytest.approx(0.75, abs=0.05)  # half of it by the ReLU
    model.freeze()
    assert (model(torch.ones(4, 1, 28, 28)).features["input_dropout"] == 1).all()


@pytest.mark.parametrize("name", ["small", "0", "800-", "-5", "8--8", "8x8"])
def test_names_that_are_no_sizes(name):
    with pytest.raises(kdkit.ModelError, match="write mlp/800-800"):
        build(name)
