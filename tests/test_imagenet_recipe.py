"""The ImageNet recipe trains whole, in small: on made-up images of four classes, with a small BEiT that has learnt nothing as teacher.

Everything that it says stays in force but sizes: of networks, images, batches, data, and epochs.
"""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from training import PATIENCE, Command, assert_same_run, lines, metrics, together, weights

from kdkit import recipe
from kdkit.recipe.fairness import differences

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "imagenet" / "resnet50_from_beit.yaml"
BEIT = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}
SMALL = {
    "extends": str(RECIPE),
    "data": {"dataset": {"root": "images"}, "image_size": 32, "batch_size": 12, "eval_batch_size": 5, "validation": 12, "workers": 0},
    "teacher": {"args": BEIT, "pretrained": False, "checkpoint": "beit.safetensors"},
    "student": {"args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}},
    "train": {"epochs": 4, "lr_schedule": {"warmup_epochs": 1, "cooldown_epochs": 1}, "average_best": 2, "device": "cpu"},
    "run": {"log_steps": 1, "checkpoint_steps": 2},
}
SIZES = {
    "data.dataset.root", "data.workers", "data.image_size", "data.batch_size", "data.eval_batch_size", "data.validation",
    "teacher.args", "teacher.pretrained", "teacher.checkpoint", "student.args",
    "train.epochs", "train.lr_schedule.warmup_epochs", "train.lr_schedule.cooldown_epochs", "train.average_best", "train.device",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the small recipe, its images (64 and 12, of several sizes) and the weights of its teacher."""
    folder, draw = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 3)):
        for label in range(4):
            place = folder / "images" / part / f"n0{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (36 + 4 * label, 44, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += 40 + 30 * (label // 3)
                Image.fromarray(pixels).save(place / f"{i}.JPEG")
    torch.manual_seed(0)
    teacher = timm.create_model("beit_base_patch16_224", num_classes=4, **BEIT)
    torch.nn.init.normal_(teacher.head.weight)  # timm's own are so small that the teacher would say the same of every image
    save_file(teacher.state_dict(), folder / "beit.safetensors")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The run that was never stopped."""
    code, log = Command(folder, "train", "small.yaml", "--run", "whole").finish()
    assert code == 0, log
    return folder / "whole"


def test_the_small_imagenet_recipe_differs_in_sizes_only(folder):
    real, small = recipe.load(RECIPE, files=False), recipe.load(folder / "small.yaml")
    changed = {key for key, *_ in differences(real.plain(), small.plain()) if not key.startswith("run.")}
    assert {key for key in changed if not any(key == size or key.startswith(f"{size}.") for size in SIZES)} == set()


@pytest.mark.slow
def test_the_imagenet_recipe_does_what_it_says(folder, whole):
    steps = [line for line in metrics(whole) if line["kind"] == "step"]
    epochs = [line for line in metrics(whole) if line["kind"] == "epoch"]
    assert len(steps) == 4 * 4 and all(math.isfinite(value) for step in steps for value in step["terms"].values())
    for step in steps:
        terms = step["terms"]
        assert terms["loss"] == pytest.approx(0.2 * terms["cross_entropy"] + 0.8 * terms["logit_kl"], rel=1e-4)
    rates = [step["lr"] for step in steps]
    assert rates[:3] == pytest.approx([8.333e-4 + i / 4 * (5e-3 - 8.333e-4) for i in (0, 1, 2)], rel=1e-3)  # warm-up
    assert max(rates) < 5e-3 + 1e-9 and rates[-4:] == pytest.approx([5e-5] * 4)  # cosine, cool-down
    result = json.loads((whole / "result.json").read_text())
    scores = {line["epoch"]: line["validation"]["top1"] for line in epochs}
    ranked = sorted(scores, key=lambda epoch: (-scores[epoch], epoch))
    assert result["averaged"] == sorted(ranked[:2]) and result["test"]["agreement"] >= 0
    assert weights(whole)["fc.weight"].shape == (4, 32)
    code, log = Command(folder, "evaluate", "whole").finish()
    assert code == 0 and f"{result['test']['nll']:.4f}" in log, log


@pytest.mark.slow
def test_the_imagenet_recipe_resumes_to_the_same_weights(folder, whole):
    command = Command(folder, "train", "small.yaml", "--run", "killed")
    wanted = random.randint(3, lines(whole) - 3)
    assert command.wait_for(lambda: lines(folder / "killed") >= wanted), command.finish()
    command.send(signal.SIGKILL)
    command.process.join()
    code, log = Command(folder, "train", "small.yaml", "--run", "killed").finish()
    assert code == 0, log
    assert_same_run(folder / "killed", whole)


@pytest.mark.slow
def test_the_imagenet_recipe_resumes_in_two_processes(folder):
    commands = together(folder, "train", "small.yaml", "--run", "two")
    assert [command.finish()[0] for command in commands] == [0, 0], commands[0].log.read_text()
    stopped = together(folder, "train", "small.yaml", "--run", "stopped")
    assert stopped[0].wait_for(lambda: lines(folder / "stopped") >= 4), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)
    assert [command.finish()[0] for command in stopped] == [143, 143], stopped[0].log.read_text()
    again = together(folder, "train", "small.yaml", "--run", "stopped")
    assert [command.finish()[0] for command in again] == [0, 0], again[0].log.read_text()
    assert "going on with stage 'distill'" in again[0].log.read_text()
    ours, theirs = weights(folder / "stopped"), weights(folder / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_accelerate_launches_the_imagenet_recipe(folder):
    kdkit = shutil.which("kdkit", path=str(Path(sys.executable).parent))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--no_python"]
    done = subprocess.run(
        [*launch, kdkit, "train", "small.yaml", "name=launched"], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and "with the mean of epochs" in done.stdout, done.stderr
    commands = together(folder, "train", "small.yaml", "--run", "again")
    assert [command.finish()[0] for command in commands] == [0, 0]
    ours, theirs = weights(folder / "runs" / "launched"), weights(folder / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
