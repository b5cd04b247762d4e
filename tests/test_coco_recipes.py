"""The recipes of COCO: what was published is written down, and both train some steps on a few images in COCO's format."""

import shutil

import pytest
from recipe_files import RECIPES, coco

import kdkit
from kdkit import recipe

SMALLER = {
    "resnet50.tv_in1k, pretrained: true": "resnet18, width: 64",
    "resnext101_64x4d.tv_in1k": "resnet26",
    "image_size: [800, 1344]": "image_size: [64, 96]",
    "batch_size: 16": "batch_size: 8",
    "workers: 8": "workers: 0",
    "epochs: 24": "epochs: 1",
    "epochs: 12": "epochs: 1",
    "evaluate_every: 8": "evaluate_every: 1",
    "precision: bf16": "precision: fp32",
    "warmup_epochs: 1": "warmup_epochs: 0",
}


def test_the_schedules_are_the_published_ones():
    student, teacher = (recipe.load(RECIPES / "coco" / name, files=False).spec for name in ("pkd.yaml", "retinanet_x101.yaml"))
    assert [(one.train.epochs, one.train.lr_schedule.milestones) for one in (student, teacher)] == [(24, (16, 22)), (12, (8, 11))]
    assert (student.data.batch_size, student.data.size, student.train.optimizer.lr) == (16, (800, 1344), 0.01)
    pkd = student.losses[1]
    assert (pkd.use, pkd.weight) == ("pkd", 40)


@pytest.mark.slow
def test_student_and_teacher_train_some_steps(tmp_path):
    pytest.importorskip("faster_coco_eval")
    folder = shutil.copytree(RECIPES / "coco", tmp_path / "recipes" / "coco")
    coco(tmp_path / "data" / "coco")
    for path in folder.glob("*.yaml"):
        text = path.read_text()
        for own, small in SMALLER.items():
            text = text.replace(own, small)
        path.write_text(text)
    result = kdkit.train(folder / "pkd.yaml", folder=tmp_path / "run", quiet=True)
    assert result.epochs == 1 and 0 <= result.test["map"] <= 100
    assert {f"ap/class {number}" for number in range(1, 6)} <= result.test.keys() and "found" in result.test
