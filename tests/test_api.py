"""What a script calls."""

import subprocess
import sys

import pytest
import torch

import kdkit
from kdkit.errors import PluginError, RecipeError

RECIPE = """\
name: script
data: {dataset: {use: digits}, train_samples: 100, batch_size: 50}
student: {model: mlp/16}
teacher: {model: mlp/32}
schedule: {use: offline}
losses: [{use: cross_entropy}, {use: logit_kl}]
train: {epochs: 2, optimizer: {lr: 0.1}}
"""


def test_importing_kdkit_loads_nothing_heavy():
    code = "import sys, kdkit, kdkit.cli; print(sorted({'torch', 'timm', 'torchvision', 'accelerate', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other():
    for name in kdkit.__all__:
        assert getattr(kdkit, name) is not None
    assert set(kdkit.__all__) <= set(dir(kdkit))
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = kdkit.nothing


def test_train_returns_the_result(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    result = kdkit.train(path, overrides={"train.epochs": 1, "losses.1.temperature": 2}, folder=tmp_path / "run", quiet=True)
    assert result.epochs == 1 and 0 <= result.test["top1"] <= 100 and result.teacher is not None
    assert result.student.is_file()
    again = kdkit.train(path, overrides={"train.epochs": 1, "losses.1.temperature": 2}, folder=tmp_path / "run", quiet=True)
    assert again == result


def test_check_returns_the_plan(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    assert kdkit.check(path).stages[0].steps == 4
    with pytest.raises(RecipeError, match="override: train.epochs"):
        kdkit.check(path, overrides={"train.epochs": "many"})


def test_a_loss_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    loss = kdkit.build_loss("rkd_distance", layers=[{"student": "a", "teacher": "a"}])
    student = kdkit.Outputs(torch.randn(4, 10), {"a": torch.randn(4, 8, requires_grad=True)})
    teacher = kdkit.Outputs(torch.randn(4, 10), {"a": torch.randn(4, 16)})
    loss.setup(student, teacher)
    value = loss(student, teacher, kdkit.Batch(torch.rand(4, 3, 8, 8), torch.arange(4), torch.arange(4)))
    value.backward()
    assert value.item() > 0 and student.features["a"].grad is not None


def test_taps_and_a_loss_together_lower_the_loss():
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        for width in (8, 32)
    ]
    student, teacher = (kdkit.taps(net, ["2"]) for net in nets)
    loss = kdkit.build_loss("hint", layers=[{"student": "2", "teacher": "2"}], adapter="linear")
    batch = kdkit.Batch(torch.rand(16, 1, 8, 8), torch.arange(16) % 10, torch.arange(16))
    with torch.no_grad():
        target = teacher(batch.inputs)
        loss.setup(student(batch.inputs), target)
    optimizer = torch.optim.Adam([*nets[0].parameters(), *loss.parameters()], lr=0.01)
    values = []
    for _ in range(30):
        value = loss(student(batch.inputs), target, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("logit_kll", {}, "no loss is called 'logit_kll'; did you mean 'logit_kl'?"),
        ("logit_kl", {"temperature": -1}, "logit_kl: temperature"),
        ("logit_kl", {"temprature": 1}, "logit_kl: temprature: no such key; did you mean 'temperature'?"),
        ("logit_kl", {"temperature": {"from": 1, "to": 2, "epochs": 3}}, "a ramp needs the engine"),
        ("hint", {}, "hint: layers: this key is required"),
    ],
)
def test_a_loss_that_cannot_be_built(name, options, says):
    with pytest.raises(PluginError) as caught:
        kdkit.build_loss(name, **options)
    assert says in str(caught.value)


def test_a_loss_that_was_not_set_up_says_so():
    loss = kdkit.build_loss("hint", layers=[{"student": "layer3", "teacher": "layer3"}])
    said = kdkit.Outputs(torch.zeros(2, 3), {"layer3": torch.zeros(2, 4, 5, 5)})
    with pytest.raises(AttributeError, match=r"call `setup\(student, teacher\)` once before the loss"):
        loss(said, said, kdkit.Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), torch.arange(2)))
    assert not hasattr(loss, "nothing_of_the_kind")


def test_a_layer_that_was_not_tapped_is_named_with_those_that_are():
    loss = kdkit.build_loss("hint", layers=[{"student": "layer1", "teacher": "layer3"}])
    said = kdkit.Outputs(torch.zeros(2, 3), {"layer3": torch.zeros(2, 4, 5, 5), "layer4": torch.zeros(2, 4, 5, 5)})
    with pytest.raises(kdkit.ShapeError, match="the student's answer has no layer 'layer1'; tapped are: layer3, layer4"):
        loss.setup(said, said)
    with pytest.raises(kdkit.ShapeError, match="the answer that teaches has no layer 'layer3'; tapped are: none"):
        loss.setup(kdkit.Outputs(torch.zeros(2, 3), {"layer1": torch.zeros(2, 4, 5, 5)}), kdkit.Outputs(torch.zeros(2, 3)))
