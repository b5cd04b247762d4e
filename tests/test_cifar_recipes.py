"""The recipes of the CIFAR-100 tables train: each for a few steps on made-up images, with a teacher that has learnt nothing."""

import json
import math
import re
from pathlib import Path

import pytest

import kdkit
from kdkit import recipe
from kdkit.recipe.sections import RecipeTeacher

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "cifar100"
PAIRS = sorted(path.parent for path in FOLDER.glob("*-*/base.yaml"))
ALL_METHODS = "resnet32x4-resnet8x4"  # this pair has every method
OFTEN = {"kd", "fsp", "review", "crd", "ofd"}  # trained in the default run; .ci/run trains all
FILES = sorted(path for pair in PAIRS for path in pair.glob("*.yaml") if path.stem != "base")
CASES = [
    pytest.param(
        path, id=f"{path.parent.name}/{path.stem}", marks=[] if path.parent.name == ALL_METHODS and path.stem in OFTEN else pytest.mark.slow
    )
    for path in FILES
]
EVERYWHERE = set("alone kd fitnet at sp cc vid rkd pkt ab ft nst crd ofd review dkd".split())  # noqa: SIM905
TINY = {"use": "synthetic", "image_size": 32, "train": 8, "test": 4, "num_classes": 4}


def test_every_pair_has_the_methods_of_the_tables():
    assert len(PAIRS) == 5
    for pair in PAIRS:
        assert {path.stem for path in pair.glob("*.yaml")} >= EVERYWHERE, pair.name
    assert all((FOLDER / ALL_METHODS / path.name).exists() for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_cifar_recipe_follows_the_protocol(path):
    ours, common = recipe.load(path).spec, recipe.load(FOLDER / "protocol.yaml").spec
    rate = 0.01 if "shufflenet" in ours.student.model else 0.05
    assert ours.data == common.data
    kept = {} if path.stem != "dot" else {"momentum": 0.0, "weight_decay": 0.0}  # its balance has them
    assert ours.train == common.train.model_copy(update={"optimizer": common.train.optimizer.model_copy(update={"lr": rate, **kept})})
    assert path.stem != "dot" or (ours.balance.momentum, ours.balance.weight_decay) == (0.9, common.train.optimizer.weight_decay)
    teacher, student = path.parent.name.split("-")
    assert ours.student.model == f"cifar/{student}"
    assert path.stem == "alone" or (isinstance(ours.teacher, RecipeTeacher) and ours.teacher.recipe.stem == teacher)
    assert re.search(r"Published: \d\d\.\d\d \(.*\)\. Protocol: ", path.read_text())


@pytest.mark.first(1)
@pytest.mark.parametrize("path", CASES)
def test_a_cifar_recipe_trains(tmp_path, path):
    found = recipe.load(path)
    changes = {"data.dataset": TINY, "data.batch_size": 4, "train.epochs": 1, "train.device": "cpu", "run.log_steps": 1}
    if found.spec.teacher:
        # Batch statistics: those that a network starts with do not hold its values back, and they double from block to block.
        changes["teacher"] = {"model": f"cifar/{path.parent.name.split('-')[0]}", "mode": "train"}
    stages = getattr(found.spec.schedule, "stages", ())
    changes |= {f"schedule.stages.{i}.epochs": 1 for i in range(len(stages))}
    kdkit.train(path, overrides=changes, folder=tmp_path, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(math.isfinite(value) for step in steps for value in step["terms"].values())
    assert {name for step in steps for name in step["terms"]} >= set(found.loss_names())
    assert len({step["stage"] for step in steps}) == max(len(stages), 1) and len(steps) == 2 * max(len(stages), 1)
