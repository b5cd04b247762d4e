"""A run whose loss adds parts to the student: what is measured is what is saved, loaded again and exported."""

import json
import warnings

import pytest
import torch
from training import PLAIN, assert_same_run, merged, train, weights, write

import kdkit
from kdkit.engine.evaluate import Judge, measure
from kdkit.recipe import load
from kdkit.runs.deployment import deployed, deploying
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun

LAYERS = [{"student": "stage4", "teacher": "stage4"}]
SIMKD = merged(
    PLAIN,
    {
        "name": "reused",
        "losses": [{"use": "simkd", "layers": LAYERS}],
        "data": {"dataset": {"image_size": 32}, "validation": 8},
        "train": {"device": "cpu", "ema": {"decay": 0.5}},
        "run": {"checkpoint_steps": 1},
    },
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("deployed"), SIMKD).folder


def test_the_deployed_network_is_saved_and_measured(run):
    names = {name.split(".")[0] for name in weights(run)}
    assert names == {"backbone", "projector", "classifier"} and not any(".fc." in name for name in weights(run))
    result = json.loads((run / "result.json").read_text())
    parameters = {id(p): p.numel() for p in LoadedRun(run).student().module.parameters()}
    assert result["parameters"] == sum(parameters.values())


@pytest.mark.parametrize("best", [False, True])
def test_the_deployed_network_is_loaded_as_it_was_measured(run, best):
    finished = LoadedRun(run)
    student = finished.student(best=best)
    saved = weights(run, "best.safetensors" if best else "student.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in student.module.state_dict().items())
    assert not any(part.training for part in student.module.modules())
    if not best:
        told = json.loads((run / "result.json").read_text())["test"]
        data = finished.data()
        found = measure(student, data.test, Judge.of(finished.recipe, data.info))
        assert found["nll"] == pytest.approx(told["nll"], rel=1e-4) and found["top1"] == told["top1"]


def test_the_deployed_weights_are_not_those_that_loading_began_with(run):
    images = torch.rand(3, 3, 32, 32)
    one, other = kdkit.load_student(run), kdkit.load_student(run)
    with torch.no_grad():
        assert torch.equal(one(images).logits, other(images).logits)
        for parameter in one.module.parameters():
            parameter.zero_()
        assert not torch.equal(one(images).logits, other(images).logits)


def test_a_run_with_a_deployed_network_resumes_to_the_same_bits(run, tmp_path):
    class Stop(Exception):
        pass

    calls = 0

    def stopping(*args, **named):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Stop
        return original(*args, **named)

    from kdkit.engine import loop

    original = loop.optimize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimize", stopping)
        with pytest.raises(Stop):
            train(tmp_path, SIMKD)
    train(tmp_path, SIMKD)
    assert_same_run(run, tmp_path / "run")


def test_export_of_a_deployed_network_to_timm_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(kdkit.ModelError, match=r"deployed with parts of simkd, which timm cannot build; use --format onnx") as caught:
        export(LoadedRun(run), "timm", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_onnx_of_a_deployed_network_gives_the_same_logits(run, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    made = export(LoadedRun(run), "onnx", tmp_path)
    assert made.files[0].name == "model.onnx"


def test_a_student_without_added_parts_is_deployed_itself(tmp_path):
    recipe = load(write(tmp_path))
    info = kdkit.DataInfo(image_shape=(3, 8, 8), num_classes=6, num_train=48, num_test=20)
    assert deploying(recipe) == [] and deployed(recipe, info, None) is None


def test_a_stage_without_the_loss_deploys_the_student_itself(tmp_path):
    stages = [{"name": "first", "losses": ["simkd"], "epochs": 1}, {"name": "last", "losses": ["cross_entropy"], "epochs": 1}]
    losses = [{"use": "simkd", "layers": LAYERS}, {"use": "cross_entropy"}]
    changes = {"losses": losses, "schedule": {"use": "staged", "stages": stages}, "train": {"ema": None}, "data": {"validation": None}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = train(tmp_path, merged(SIMKD, changes)).folder
    assert "fc.weight" in weights(folder)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert kdkit.load_student(folder)(images).logits.shape == (2, 6)
    export(LoadedRun(folder), "timm", tmp_path / "out")


def test_a_teacher_of_another_recipe_lends_its_classifier_to_be_deployed(tmp_path):
    plain = {key: value for key, value in merged(SIMKD, {"losses": [{"use": "cross_entropy"}]}).items() if key != "teacher"}
    write(tmp_path, {**plain, "name": "teacher", "schedule": {"use": "supervised"}}, "teacher.yaml")
    folder = train(tmp_path, {**SIMKD, "teacher": {"recipe": "teacher.yaml"}, "run": {"folder": str(tmp_path)}}).folder
    saved, teacher = weights(folder), tmp_path / "teacher"
    assert torch.equal(saved["classifier.weight"], weights(teacher)["fc.weight"])
    with torch.no_grad():
        assert kdkit.load_student(folder)(torch.rand(2, 3, 32, 32)).logits.shape == (2, 6)
