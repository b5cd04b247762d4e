"""The study of ants and bees: planned as it is beside made-up photographs and backbones, and carried out whole with small networks."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from recipe_files import RECIPES, backbone, lay_out, photographs

from kdkit import cli, recipe
from kdkit.recipe import fairness
from kdkit.runs import checks
from kdkit.runs.folder import RunFolder
from kdkit.study import loading as study_file
from kdkit.study.findings import Findings
from kdkit.study.report import output as report

FOLDER = RECIPES / "hymenoptera"
STUDIES = ["alpha", "alpha_small"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("plan")) / "hymenoptera"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_hymenoptera_study_compares_networks_of_the_published_sizes(folder, name):
    study = study_file.load([folder / f"{name}.yaml"])
    fairness.refuse_unequal(study.variants, study.baseline, study.allow)
    assert list(study.variants) == ["alpha_0", "alpha_0.5", "alpha_1"] and study.seeds == (0, 1, 2, 3)
    made = checks.make(study.variants["alpha_0.5"])
    assert (made.student.parameters, made.teachers[0].parameters) == (11_177_538, 23_512_130)
    assert (made.num_train, made.info.num_test, made.info.class_names) == (244, 153, ("ants", "bees"))
    assert [(stage.epochs, stage.steps) for stage in made.stages] == [(25, 8 * 25)]


@pytest.mark.parametrize("name", ["base", "teacher"])
def test_the_hymenoptera_protocol_is_the_published_one(name):
    spec = recipe.load(FOLDER / f"{name}.yaml").spec
    optimizer, schedule = spec.train.optimizer, spec.train.lr_schedule
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("momentum", 0.001, 0.9, 0)
    assert (schedule.name, schedule.step_epochs, schedule.decay_rate, schedule.warmup_epochs) == ("step", 7, 0.1, 0)
    assert (spec.train.epochs, spec.data.batch_size, spec.data.drop_last) == (25, 32, False)
    assert (spec.data.image_size, spec.data.image_size / spec.data.crop_pct) == (224, 256)
    assert spec.student.pretrained and spec.data.dataset.download and spec.student.model.endswith(".tv_in1k")


@pytest.mark.slow
def test_the_small_hymenoptera_study_from_the_backbones_to_the_report(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    folder = shutil.copytree(FOLDER, tmp_path / "recipes" / "hymenoptera")
    photographs(tmp_path, {"train": 36, "val": 16})
    for name in ("resnet18", "resnet50"):
        backbone(tmp_path, name, timm.create_model("test_resnet", num_classes=100).state_dict())
    for path in folder.glob("*.yaml"):
        text = re.sub(r"model: resnet\d+(?!\.)", "model: test_resnet", path.read_text())
        path.write_text(text.replace("image_size: 64", "image_size: 32").replace("epochs: 25", "epochs: 3"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdkit.study.measurements.LATENCY_RUNS", 3)
    assert cli.app(["compare", "recipes/hymenoptera/alpha_small.yaml", "--seeds", "2", "data.workers=0"], standalone_mode=False) is None
    said = capsys.readouterr().out
    results = next(part for part in said.split("\n\n") if "top-1 %" in part).splitlines()
    for title in ("training loss, last 60 % of epochs", "top-1 %", "mean |z_s - z_t|"):
        assert title in results[-5]
    assert re.match(r"teacher hymenoptera-teacher-small +\d+\.\d\d", results[-4])
    for name, line in zip(("alpha_0", "alpha_0.5", "alpha_1"), results[-3:], strict=True):
        assert line.startswith(f"{name} ") and line.count("+-") == 4, "top-1, agreement, late loss, logit difference"
    (teacher,) = [run for run in Path("runs").glob("*/run.json") if "teacher-small" in str(run)]
    assert RunFolder(teacher.parent).result().test == dict(Findings.load(Path("runs/hymenoptera_alpha_small/study.json")).teacher.last)
    written = report.write([Path("runs/hymenoptera_alpha_small")])
    drawn = {file.stem for file in written.files}
    assert {"training-loss-1", "learning-curves-1", "logit-difference-1"} <= drawn and written.missing == ()
    text = written.page.with_suffix(".md").read_text()
    for start in ("Training loss of each variant", "Test top-1 over the epochs", r"Mean of \|z\_s - z\_t\| over samples and classes"):
        assert re.search(rf"!\[{re.escape(start)}: .*alpha\\_0 .*alpha\\_0\.5 .*alpha\\_1", text)
