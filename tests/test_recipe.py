"""Recipes: what is valid, what is told of what is not, what identifies one."""

import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from kdkit import recipe
from kdkit.contracts.options import Ramp
from kdkit.errors import RecipeError
from kdkit.recipe import registry, types

GOOD = """\
name: good
data: {dataset: {use: digits}, batch_size: 50}
student: {model: test_resnet}
teacher: {model: test_resnet}
schedule: {use: offline}
losses:
  - {use: cross_entropy, weight: 0.1}
  - {use: logit_kl, weight: 0.9, temperature: 4}
  - use: hint
    layers: [{student: stage1, teacher: stage1}]
train:
  epochs: 3
  optimizer: {lr: 5e-2}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems(path, **overrides):
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return str(caught.value).splitlines()


def test_a_good_recipe(write):
    loaded = recipe.load(write(GOOD))
    assert loaded.spec.losses[1].temperature == 4.0 and loaded.spec.train.optimizer.lr == 0.05
    assert loaded.loss_names() == ["cross_entropy", "logit_kl", "hint"]


BAD = {  # what is replaced, by what; the line; what the message says
    "loss": ("use: hint", "use: hnit", 9, "losses.2.use: unknown 'hnit'; did you mean 'hint'? allowed: "),
    "key": ("temperature: 4", "temprature: 4", 8, "losses.1.temprature: no such key; did you mean 'temperature'? allowed: "),
    "value": ("temperature: 4", "temperature: -4", 8, "losses.1.temperature: input should be greater than 0, got -4"),
    "layer key": ("teacher: stage1", "techer: stage1", 10, "losses.2.layers.0.techer: no such key; did you mean 'teacher'?"),
    "missing": ("{use: offline}", "{}", 5, "schedule: needs a `use:`"),
    "type": ("weight: 0.1", "weight: heavy", 7, "losses.0.weight: input should be a valid number"),
    "top": ("schedule:", "schedul:", 5, "schedul: no such key; did you mean 'schedule'?"),
    "duplicate": ("name: good", "name: good\nname: again", 2, "name: is given twice"),
    "dataset": ("use: digits", "use: digts", 2, "data.dataset.use: unknown 'digts'; did you mean 'digits'?"),
    "source": ("teacher: {model: test_resnet}", "teacher: {model: torchvison/resnet18}", 4, "teacher.model: no model source is called 'torchvison'; did you mean 'torchvision'?"),
    "option of another source": ("student: {model: test_resnet}", "student: {model: mlp/10, stem: small}", 3, "student.stem: no such key"),
    "role": ("use: offline", "use: supervised", 4, "teacher: schedule 'supervised' has no teacher"),
    "no teacher": ("teacher: {model: test_resnet}\n", "", 4, "schedule: schedule 'offline' needs a `teacher:`"),
    "file": ("teacher: {model: test_resnet}", "teacher: {model: test_resnet, checkpoint: gone.pt}", 4, "teacher.checkpoint: no such file: "),
    "recipe": ("teacher: {model: test_resnet}", "teacher: {recipe: gone.yaml}", 4, "teacher.recipe: no such file: "),
    "ramp": ("weight: 0.9", "weight: {from: 1, to: -2, epochs: 3}", 8, "losses.1.weight: to: input should be greater than or equal to 0, got -2"),
    "ramp key": ("weight: 0.9", "weight: {from: 1, too: 2, epochs: 3}", 8, "losses.1.weight.too: no such key; did you mean 'to'? allowed: epochs, from, shape, start, to"),
    "literal": ("optimizer:", "lr_schedule: {name: cosin}\n  optimizer:", 13, "train.lr_schedule.name: got 'cosin'; did you mean 'cosine'? allowed: "),
    "two ways": ("batch_size: 50", "train_samples: 5, train_fraction: 0.5", 2, "data: give train_samples or train_fraction, not both"),
    "device": ("optimizer:", "device: gpu\n  optimizer:", 13, "train.device: torch knows no device 'gpu'; `auto` takes the accelerator there is"),
    "name": ("name: good", "name: a/b", 1, "name: may hold letters, digits, '.', '_' and '-', a letter or digit first, got 'a/b'"),
    "same names": ("use: logit_kl, weight: 0.9, temperature: 4", "use: logit_kl, name: x}\n  - {use: logit_mse, name: x", 8, "losses.1.name: 'x' names two losses"),
    "plugin": ("name: good", "name: good\nplugins: [gone.py]", 2, "plugins.0: no such file or folder: "),
    "fold": ("teacher: {model: test_resnet}", "teacher: {model: test_resnet, mode: train, fold_batchnorm: true}", 4, "teacher.fold_batchnorm: folded layers have no batch statistics"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_says_where_and_what(write, case):
    old, new, line, says = BAD[case]
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    assert f"{path}:{line}: {says}" in "\n".join(problems(path))


def test_all_problems_of_a_recipe_at_once_each_once(write):
    path = write(GOOD.replace("use: hint", "use: hnit").replace("epochs: 3", "epochs: -3").replace("schedule:", "schedul:"))
    told = problems(path)
    assert len(told) == len(set(told)) and {line.split(": ")[1] for line in told} == {"losses.2.use", "train.epochs", "schedul", "schedule"}


def test_a_problem_in_the_parent_points_there(write):
    base = write(GOOD.replace("batch_size: 50", "batchsize: 50"), "base.yaml")
    child = write("extends: base.yaml\nname: child\nseed: x\n", "child.yaml")
    assert any(line.startswith(f"{base}:2: data.batchsize") for line in problems(child))
    assert any(line.startswith(f"{child}:3: seed") for line in problems(child))


def test_a_problem_in_an_override_says_so(write):
    assert problems(write(GOOD), **{"train.epochs": 0})[0].startswith("override: train.epochs: ")


def test_ramps(write):
    loaded = recipe.load(write(GOOD), {"losses.logit_kl.temperature": {"from": 8, "to": 2, "epochs": 3}})
    assert loaded.spec.losses[1].temperature == Ramp(from_=8, to=2, epochs=3)


def test_the_resolved_recipe_is_flat_and_means_the_same(write, tmp_path):
    write(GOOD, "base.yaml")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    child = write("extends: base.yaml\nteacher: {checkpoint: weights.safetensors}\n", "child.yaml")
    loaded = recipe.load(child, {"losses.0.weight": {"from": 1, "to": 0.5, "epochs": 2}})
    (tmp_path / "elsewhere").mkdir()
    flat = tmp_path / "elsewhere" / "flat.yaml"
    flat.write_text(loaded.dump())
    assert "extends" not in yaml.safe_load(flat.read_text())
    again = recipe.load(flat)
    assert again.plain() == loaded.plain() and again.fingerprint == loaded.fingerprint


def test_the_fingerprint_is_of_what_the_weights_depend_on(write, tmp_path):
    path = write(GOOD)
    same = [{}, {"name": "other"}, {"run.folder": "elsewhere"}, {"run.log_steps": 1}, {"data.workers": 0}]
    other = [{"seed": 1}, {"train.epochs": 4}, {"losses.1.temperature": 5}, {"data.batch_size": 25}]
    assert len({recipe.load(path, overrides).fingerprint for overrides in same}) == 1
    assert len({recipe.load(path, overrides).fingerprint for overrides in ({}, *other)}) == 1 + len(other)
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"one")
    first = recipe.load(path, {"teacher.checkpoint": str(weights)}).fingerprint
    weights.write_bytes(b"two")
    assert recipe.load(path, {"teacher.checkpoint": str(weights)}).fingerprint != first


def test_a_teacher_recipe_counts_with_its_content(write):
    write(GOOD.replace("teacher: {model: test_resnet}\n", "").replace("offline", "supervised"), "teacher.yaml")
    path = write(GOOD.replace("{model: test_resnet}\nsched", "{recipe: teacher.yaml}\nsched"))
    before = recipe.load(path).fingerprint
    write(
        GOOD.replace("teacher: {model: test_resnet}\n", "").replace("offline", "supervised").replace("epochs: 3", "epochs: 5"),
        "teacher.yaml",
    )
    assert recipe.load(path).fingerprint != before


def test_the_same_loss_twice_gets_two_names(write):
    loaded = recipe.load(write(GOOD.replace("use: logit_kl", "use: cross_entropy, label_smoothing: 0.1").replace(", temperature: 4", "")))
    assert loaded.loss_names() == ["cross_entropy", "cross_entropy_2", "hint"]


def test_the_schema_accepts_what_kdkit_accepts(write):
    validator = Draft202012Validator(json.loads(types.schema(registry.load())))
    assert not list(validator.iter_errors(yaml.safe_load(GOOD.replace("5e-2", "0.05"))))
    assert list(validator.iter_errors(yaml.safe_load(GOOD.replace("use: hint", "use: hnit"))))
    assert list(validator.iter_errors(yaml.safe_load(GOOD.replace("temperature: 4", "temprature: 4"))))
