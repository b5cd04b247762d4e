"""What is exported gives the student's logits: in timm, in ONNX Runtime, in kdkit, in the user's own code."""

import importlib.util
import json
import shutil
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training import task

import kdkit
from kdkit import cli
from kdkit.contracts.dataset_source import DataInfo
from kdkit.students import export_onnx
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun

NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes, width):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))
"""
STUDENTS = {
    "plain": "model: resnet18, args: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}",
    "small": "model: resnet18, stem: small, args: {layers: [1, 1, 1, 1], channels: [4, 8, 8, 8]}",
    "resized": "model: resnet18, args: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8], in_chans: 3}, input_size: 16, "
    "normalize: {mean: [0.1, 0.2, 0.3], std: [0.5, 0.25, 0.4321]}",
    "mlp": "model: mlp/12",
    "python": "model: python/Net, file: net.py, args: {width: 9}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder for each of the students."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "net.py").write_text(NET)
    found = {}
    for name, student in STUDENTS.items():
        (folder / f"{name}.yaml").write_text(
            f"{{name: {name}, data: {{dataset: {{use: digits}}, train_samples: 64, batch_size: 32}}, student: {{{student}}}, "
            "schedule: {use: offline}, teacher: {model: mlp/20}, losses: [{use: cross_entropy}, {use: logit_kl}], "
            "train: {epochs: 1, optimizer: {lr: 0.1}, device: cpu}}"
        )
        found[name] = kdkit.train(folder / f"{name}.yaml", folder=folder / name, quiet=True).folder
    return found


def net(runs):
    """The file of which the student `python` is."""
    return [runs["python"].parent / "net.py"]


def images(count=5):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def logits(model, batch):
    with torch.no_grad():
        return model(batch)


def run_cli(monkeypatch, *words):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("name", ["plain", "resized"])
def test_timm_loads_a_timm_student(name, runs, tmp_path):
    made = export(LoadedRun(runs[name], plugins=net(runs)), folder=tmp_path / "out")
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    student = kdkit.load_student(runs[name], plugins=net(runs))
    batch = images()
    torch.testing.assert_close(logits(network, student.adapt(batch)), logits(student, batch).logits, rtol=1e-5, atol=1e-6)
    assert any("timm.create_model" in note and "same logits" in note for note in made.notes)


def test_timm_s_config_says_what_images_the_network_takes(runs, tmp_path):
    export(LoadedRun(runs["resized"]), folder=tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    config = timm.data.resolve_data_config({}, model=network)
    assert config["input_size"] == (3, 16, 16)
    assert [*config["mean"], *config["std"]] == [0.1, 0.2, 0.3, 0.5, 0.25, 0.4321]
    assert config["interpolation"] == "bilinear" and config["crop_pct"] == 1.0
    assert network.num_classes == 10 and network.pretrained_cfg["label_names"][3] == "3"


@pytest.mark.parametrize("name", STUDENTS)
def test_weights_are_the_student_s_alone(name, runs, tmp_path):
    export(LoadedRun(runs[name], plugins=net(runs)), folder=tmp_path)
    written, student = load_file(tmp_path / "model.safetensors"), load_file(runs[name] / "student.safetensors")
    assert written.keys() == student.keys() == kdkit.load_student(runs[name], plugins=net(runs)).module.state_dict().keys()
    assert all(torch.equal(written[key], student[key]) for key in student)


@pytest.mark.parametrize("name", ["plain", "small", "resized", "mlp"])
def test_kdkit_loads_what_it_exported(name, runs, tmp_path):
    export(LoadedRun(runs[name], plugins=net(runs)), folder=tmp_path)
    batch = images()
    found, expected = (logits(kdkit.load_student(folder), batch).logits for folder in (tmp_path, runs[name]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_small_stem_is_refused_to_timm_and_said_so(runs, tmp_path, monkeypatch, capsys):
    assert run_cli(monkeypatch, "export", runs["small"], "--output", tmp_path) == 0
    out = capsys.readouterr().out
    assert "plain timm cannot rebuild this network: its conv1.weight is (4, 1, 3, 3), that of timm's (64, 1, 7, 7)" in out
    assert f'kdkit.load_student("{tmp_path}")' in out
    with pytest.raises(RuntimeError, match="Unknown model .kdkit:timm/resnet18"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_network_of_the_user_s_file_is_described_without_the_file_s_place(runs, tmp_path):
    made = export(LoadedRun(runs["python"], plugins=net(runs)), folder=tmp_path)
    assert any("build the network by net.py" in note for note in made.notes)
    about = (tmp_path / "config.json").read_text()
    assert json.loads(about)["kdkit"]["options"]["args"] == {"width": 9} and str(runs["python"].parent) not in about
    with pytest.raises(kdkit.ModelError, match=r"net\.py, which kdkit does not run unasked"):
        kdkit.load_student(tmp_path)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))
    own.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(logits(own, images()), logits(kdkit.load_student(runs["python"], plugins=net(runs)), images()).logits)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["small", "resized"])
def test_onnx_runtime_gives_the_student_s_logits_for_any_batch(name, runs, tmp_path, monkeypatch, capsys):
    import onnxruntime

    assert run_cli(monkeypatch, "export", runs[name], "--format", "onnx", "--output", tmp_path) == 0
    assert "largest difference from torch's logits" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about["class_names"] == [str(digit) for digit in range(10)] and about["input_shape"] == [1, 8, 8]
    assert about["input_range"] == [0, 1] and about["kdkit_version"] == kdkit.__version__
    assert (about["task"], about["rows_are"]) == ("classification", "classes")
    student = kdkit.load_student(runs[name], plugins=net(runs))
    for count in (1, 2, 7):
        found = session.run(["logits"], {"images": images(count).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), logits(student, images(count)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "answer"), [("multilabel", "logits"), ("regression", "numbers")])
def test_other_tasks_name_their_outputs(kind, answer, tmp_path):
    import onnxruntime

    student = kdkit.taps(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), [])
    made = export_onnx.write_onnx(student, DataInfo((1, 2, 2), 2, 1, 1, ("left", "right")), task(kind), tmp_path)
    assert f"to {answer}, any batch size" in made.notes[0]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert [one.name for one in session.get_outputs()] == [answer]
    assert (about["class_names"], about["task"], about["rows_are"]) == (["left", "right"], kind, task(kind).rows_are)


def test_an_export_s_weights_and_configuration_name_the_classes(runs, tmp_path):
    export(LoadedRun(runs["plain"]), folder=tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list("0123456789")
    assert about["label_names"] == about["kdkit"]["class_names"] == list("0123456789")
    assert (about["kdkit"]["task"], about["kdkit"]["rows_are"]) == ("classification", "classes")


def test_other_logits_in_onnx_are_an_error(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)
    assert run_cli(monkeypatch, "export", runs["mlp"], "--format", "onnx", "--output", tmp_path) == 2
    said = capsys.readouterr().err
    assert "gives other logits than torch" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_network_that_onnx_cannot_express_is_an_error(tmp_path, capfd):
    class Asking(nn.Module):
        def forward(self, batch):
            return batch.flatten(1) if batch.sum() > 0 else -batch.flatten(1)

    student = kdkit.taps(Asking(), [])
    with pytest.raises(kdkit.ModelError, match=r"ONNX cannot express this network: \w+: .*data-dependent") as error:
        export_onnx.write_onnx(student, DataInfo((1, 2, 2), 4, 1, 1), task(), tmp_path)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    student.module.not_in_onnx = "it asks"
    with pytest.raises(kdkit.ModelError, match="^ONNX cannot express this network: it asks$"):
        export_onnx.write_onnx(student, DataInfo((1, 2, 2), 4, 1, 1), task(), tmp_path)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_a_missing_extra_is_one_line(runs, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert run_cli(monkeypatch, "export", runs["mlp"], "--format", "onnx") == 2
    assert capsys.readouterr().err == "--format onnx needs onnxruntime: pip install kdkit[export]\n"


def test_an_unfinished_run_is_not_exported(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs["mlp"], tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").unlink()
    assert run_cli(monkeypatch, "export", tmp_path / "run") == 2
    assert "is not finished (1 epochs so far)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(("content", "says"), [(None, "neither a run folder"), ("{}", "was not written by `kdkit export`")])
def test_a_folder_that_holds_no_student_is_told(content, says, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(kdkit.RunError, match=says):
        kdkit.load_student(tmp_path)


def test_options_that_are_not_known_here_are_told(runs, tmp_path):
    export(LoadedRun(runs["mlp"]), folder=tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["kdkit"]["options"]["wings"] = 2
    del about["kdkit"]["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(kdkit.ModelError, match=r"config\.json: wings: "):
        kdkit.load_student(tmp_path)
