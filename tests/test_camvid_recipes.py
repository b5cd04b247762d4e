"""The recipes of street scenes: the published protocol is planned and trains some steps; the study is carried out whole, with few frames."""

import re
import shutil
from pathlib import Path

import pytest
from recipe_files import RECIPES, street_scenes

import kdkit
from kdkit import cli, recipe
from kdkit.study.report import output as report

pytest.importorskip("segmentation_models_pytorch")


def test_the_protocol_is_the_published_one():
    spec = recipe.load(RECIPES / "camvid" / "protocol.yaml", files=False).spec
    augment = spec.data.joint_augment
    assert (augment.crop, augment.scale, augment.flip, spec.data.size) == ((360, 360), (0.5, 2.0), 0.5, (360, 480))
    assert (spec.train.optimizer.name, spec.train.optimizer.lr, spec.train.lr_schedule.name) == ("momentum", 0.02, "poly")
    assert spec.train.epochs * (468 // spec.data.batch_size) == pytest.approx(40_000, rel=0.01)
    assert [(entry.use, entry.weight) for entry in spec.losses] == [
        ("cross_entropy", 1.0), ("logit_kl", 1.0), ("cirkd_pixel", 1.0), ("cirkd_memory", 0.1)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_published_protocol_trains_some_steps(tmp_path):
    folder = shutil.copytree(RECIPES / "camvid", tmp_path / "recipes" / "camvid")
    street_scenes(tmp_path / "data" / "camvid_full", (480, 360), 3)
    for path in folder.glob("protocol*.yaml"):
        small = path.read_text().replace("pretrained: true", "pretrained: false").replace("epochs: 1380", "epochs: 1")
        small = small.replace("evaluate_every: 138", "evaluate_every: 1").replace("crop: [360, 360]", "crop: [64, 64]")
        path.write_text(small.replace("image_size: [360, 480]", "image_size: [72, 96]"))
    changes = {"data.batch_size": 2, "data.workers": 0}
    teacher = folder / "protocol_teacher.yaml"
    teacher.write_text(teacher.read_text() + "data: {batch_size: 2, workers: 0}\n")
    result = kdkit.train(folder / "protocol.yaml", overrides=changes, folder=tmp_path / "run", quiet=True)
    assert result.epochs == 1 and 0 <= result.test["mean_iou"] <= 100


@pytest.mark.slow
def test_the_study_from_the_frames_to_the_report(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(RECIPES / "camvid", tmp_path / "recipes" / "camvid")
    street_scenes(tmp_path / "data" / "camvid", (240, 180), 8)
    for path in folder.glob("*.yaml"):
        path.write_text(re.sub(r"(epochs|evaluate_every): \d+", r"\1: 1", path.read_text()).replace("warmup_epochs: 1", "warmup_epochs: 0"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdkit.study.measurements.LATENCY_RUNS", 3)
    assert cli.app(["compare", "recipes/camvid/knowledge.yaml", "--seeds", "1", "data.workers=0"], standalone_mode=False) is None
    assert "mean IoU %" in capsys.readouterr().out
    written = report.write([Path("runs/camvid_knowledge")])
    page = Path("runs/camvid_knowledge/report.md").read_text()
    assert written.missing == () and "IoU %" in page and "bicyclist" in page and "Answers to test images" in page
