"""`new_head: true`: a network goes on from one of other classes, wherever it comes from, and what is trained so is a run like any other."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from training import PLAIN, merged, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.contracts.dataset_source import DataInfo
from kdkit.models.build import build_model
from kdkit.recipe import registry
from kdkit.runs import checks
from kdkit.runs.networks import ModelFactory
from kdkit.runs.trained_teachers import options_of
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun

NET = """\
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize(
    ("model", "options", "head"),
    [
        ("test_resnet", {}, "fc"),
        ("test_vit", {"args": {"img_size": 32}}, "head"),
        ("test_convnext", {}, "head.fc"),
        ("cifar/resnet8", {}, "fc"),
        ("cifar/vgg8", {}, "classifier"),
        ("torchvision/shufflenet_v2_x0_5", {}, "fc"),
        ("torchvision/mobilenet_v3_small", {}, "classifier.3"),
        ("mlp/8", {}, "fc"),
        ("python/Net", {"file": "net.py"}, "2"),
    ],
)
def test_every_source_keeps_its_own_classifier(tmp_path, monkeypatch, model, options, head):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    sources = registry.load().models
    kind, _, name = model.rpartition("/")
    side = 8 if kind in ("python", "mlp") else 32

    def build(classes, **more):
        torch.manual_seed(classes)
        source = sources[kind or "timm"](sources[kind or "timm"].Options(model=model, **options, **more), name)
        return build_model(source.options, source, classes, (3, side, side)).module.state_dict()

    theirs = {key: value.clone().contiguous() for key, value in build(7).items()}
    save_file(theirs, tmp_path / "w.safetensors")
    fresh, found = build(2), build(2, checkpoint=str(tmp_path / "w.safetensors"), new_head=True)
    new = {key for key in found if key.startswith(f"{head}.")}
    assert new and all(torch.equal(found[key], fresh[key]) for key in new)
    assert all(torch.equal(found[key], theirs[key]) for key in found.keys() - new)
    with pytest.raises(kdkit.ModelError, match="of 7 classes, not of 2; `new_head: true` leaves it out"):
        build(2, checkpoint=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_0", "deit_tiny_distilled_patch16_224"])
def test_a_network_without_a_single_classifier_is_refused_at_check(tmp_path, name):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    student = {"model": name, "checkpoint": str(tmp_path / "w.safetensors"), "new_head": True, "args": {}, "input_size": 224}
    path = write(tmp_path, {**PLAIN, "student": student})
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: student.model: new_head: this network has no single linear") as caught:
        kdkit.check(path)
    assert "\n" not in str(caught.value)


SMALL = {"model": "mlp/8"}
ALONE = {"teacher": None, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}]}
SHORT = {**PLAIN, "student": SMALL, "train": {"epochs": 1, "optimizer": {"lr": 0.05}}}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The student of a finished run with four classes."""
    return train(tmp_path_factory.mktemp("before"), merged(SHORT, {**ALONE, "data": {"dataset": {"num_classes": 4}}})).student


def after(folder, before):
    """A recipe of six classes that goes on from it."""
    begun = {"name": "after", "student": {"checkpoint": str(before), "new_head": True}, "run": {"folder": str(folder)}}
    return merged(SHORT, {**ALONE, **begun, "student": {**SMALL, **begun["student"]}})


def test_a_new_head_on_another_runs_student_is_read_again(tmp_path, before):
    shutil.copy(before, tmp_path / "begin.safetensors")
    trained = train(tmp_path, after(tmp_path, tmp_path / "begin.safetensors"))
    (tmp_path / "begin.safetensors").unlink()  # a trained network needs it no more
    run = LoadedRun(tmp_path / "run")
    assert weights(tmp_path / "run")["fc.weight"].shape[0] == 6 and run.folder.result() == trained
    assert all(torch.equal(value, weights(tmp_path / "run")[key]) for key, value in run.student().module.state_dict().items())
    export(run, folder=tmp_path / "exported")
    images = torch.rand(3, *run.info.image_shape)
    assert torch.equal(kdkit.load_student(tmp_path / "exported")(images).logits, run.student()(images).logits)
    assert "new_head" not in json.loads((tmp_path / "exported" / "config.json").read_text())["kdkit"]["options"]


def test_a_teacher_of_another_recipe_has_its_trained_head(tmp_path, before):
    path = write(tmp_path, after(tmp_path, before), "after.yaml")
    train(tmp_path, {**SHORT, "teacher": {"recipe": str(path)}, "run": {"folder": str(tmp_path)}}, into="taught")
    (teacher,) = LoadedRun(tmp_path / "taught").teachers()
    assert all(torch.equal(value, weights(tmp_path / "after")[key]) for key, value in teacher.module.state_dict().items())


def test_a_network_that_a_schedule_names_is_taken_down_without_its_beginning(tmp_path, before):
    loaded = recipe.load(write(tmp_path, after(tmp_path, before)))
    factory = ModelFactory(loaded, DataInfo((3, 8, 8), 6, 48, 20), {}, device=torch.device("cpu"))
    network = factory.network(factory.student(loaded.spec.student.model_copy()))
    known = options_of(loaded, network)
    assert (known.model, known.checkpoint, known.new_head) == ("mlp/8", None, False)


def test_new_head_left_out_changes_no_fingerprint(tmp_path):
    path = write(tmp_path)
    assert "new_head" not in recipe.load(path).content()["student"]
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "w.safetensors")
    teacher = {"model": "test_resnet", "checkpoint": str(tmp_path / "w.safetensors"), "new_head": True}
    found = recipe.load(write(tmp_path, {**PLAIN, "teacher": teacher}))
    assert found.content()["teacher"]["new_head"] is True
    assert any("the classifier of teacher is random (`new_head`)" in note for note in checks.make(found).notes)
