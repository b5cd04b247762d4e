"""NaN and infinity: refused of those who teach, by name, and never written into JSON."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from training import PLAIN, merged, train

import kdkit
from kdkit.engine.evaluate import Tally
from kdkit.finite import FiniteAnswers, faulty_weight, metrics_with_nan, to_json
from kdkit.runs.folder import RunFolder
from kdkit.runs.networks import ModelFactory

NETWORK = '''
import torch


class Net(torch.nn.Module):
    """Divides by how far the image's mean is from `pole`, where it is nearer than `reach`."""

    def __init__(self, num_classes, pole=-9.0, reach=0.0):
        super().__init__()
        self.pole, self.reach = pole, reach
        self.head = torch.nn.Linear(3 * 64, num_classes)

    def forward(self, x):
        near = (x.mean((1, 2, 3)) - self.pole).abs() < self.reach
        return self.head(x.flatten(1)) / (~near).float()[:, None]
'''
HARD = [{"use": "cross_entropy"}, {"use": "hard_label"}]


def taught_by(folder, **args):
    (folder / "net.py").write_text(NETWORK)
    network = {"model": "python/Net", "file": "net.py"}
    return merged(PLAIN, {"student": None, "teacher": None}) | {
        "student": network, "teacher": {**network, "args": args}, "losses": HARD,
    }  # fmt: skip


def refused(folder, recipe, **changes):
    with pytest.raises(kdkit.KdkitError) as told:
        train(folder, recipe, **changes)
    assert "\n" not in str(told.value) and not (folder / "run" / "result.json").exists()
    return str(told.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_weights_that_are_not_finite_are_refused_before_anything_is_trained(tmp_path, whose, number):
    recipe = taught_by(tmp_path)
    weights = {"head.weight": torch.zeros(6, 192), "head.bias": torch.zeros(6)}
    weights["head.weight"][2, 3] = number
    save_file(weights, tmp_path / "w.safetensors")
    recipe[whose] = {**recipe[whose], "checkpoint": "w.safetensors"}
    says = refused(tmp_path, recipe)
    assert f"{whose}.model: " in says and "recipe.yaml:" in says
    assert "w.safetensors: the weights are not finite: head.weight holds 1 of 1,152 numbers" in says


def test_a_buffer_may_hold_minus_infinity_as_masks_do():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert faulty_weight(module) is None
    module.running_var[0] = math.inf
    assert faulty_weight(module) == "running_var holds 1 of 2 numbers that are NaN or infinite"


def test_a_teacher_whose_answers_to_test_data_are_not_finite_is_refused_by_name(tmp_path):
    says = refused(tmp_path, taught_by(tmp_path, pole=0.5, reach=9.0))
    assert "teacher: its logits are NaN or infinite for 20 of the 20 samples" in says and "number 0" in says


@pytest.mark.parametrize("cache", [None, {"dir": "kept", "views": 1}], ids=["asked", "cached"])
def test_a_teacher_that_fails_on_training_images_is_refused_by_name(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("kdkit.runs.training._measure_teacher", lambda setting: setattr(setting, "teacher", None))
    recipe = taught_by(tmp_path, pole=0.5, reach=9.0)
    recipe["teacher"] |= {"cache": cache} if cache else {}
    says = refused(tmp_path, recipe)
    assert says.startswith("teacher: its answers hold NaN or infinite numbers (logits); look at its weights")


def test_a_teacher_that_fails_on_a_later_batch_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("kdkit.runs.training._measure_teacher", lambda setting: setattr(setting, "teacher", None))
    recipe = taught_by(tmp_path, pole=0.5, reach=9.0)
    monkeypatch.setattr("kdkit.runs.networks.ModelFactory.verify_finite", after_the_first(ModelFactory.verify_finite))
    says = refused(tmp_path, recipe)
    assert "stage 'distill', teacher: its answers hold NaN" in says and "last good checkpoint" in says


def after_the_first(verify):
    """As if the first batch, by which a stage is set up, had been fine."""
    calls = []

    def later(factory):
        calls.append(factory)
        if len(calls) > 1:
            verify(factory)

    return later


def test_answers_are_noted_without_waiting_and_verified_by_name():
    said = FiniteAnswers("teacher t")
    said.verify()
    said.note({"logits": torch.ones(2), "labels": torch.ones(2, dtype=torch.int64)})
    said.verify()
    said.note({"logits": torch.ones(2), "stage1": torch.tensor([1.0, math.inf])})
    said.note({"logits": torch.ones(2), "stage1": torch.ones(2)})
    with pytest.raises(kdkit.RunError, match=r"^teacher t: its answers hold NaN or infinite numbers \(stage1\); look at"):
        said.verify()


def test_json_has_null_for_what_is_no_number():
    found = {"test": {"top1": 1.5, "nll": math.nan}, "rows": (math.inf, 2), "name": "x"}
    text = to_json(found)
    assert text == '{"test": {"top1": 1.5, "nll": null}, "rows": [null, 2], "name": "x"}'
    read = json.loads(text, object_hook=metrics_with_nan)
    assert math.isnan(read["test"]["nll"]) and read["test"]["top1"] == 1.5 and read["rows"] == [None, 2]


def test_a_metric_that_is_no_number_is_null_in_the_files_and_told(tmp_path, monkeypatch):
    values = Tally.values
    monkeypatch.setattr(Tally, "values", lambda self: {**values(self), "nll": math.nan})
    result = train(tmp_path)
    assert "nll of the student on test data is not finite; the files have null for it" in result.warnings
    text = (tmp_path / "run" / "result.json").read_text()
    assert "NaN" not in text and json.loads(text)["test"]["nll"] is None
    assert math.isnan(RunFolder(tmp_path / "run").result().test["nll"])
    assert all(math.isnan(line["test"]["nll"]) for line in RunFolder(tmp_path / "run").metrics("epoch"))
