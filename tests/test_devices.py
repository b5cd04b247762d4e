"""Images are channels-last in memory where that is safe, and every part of kdkit follows one answer to whether they are."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from recipe_files import RECIPES
from torch import nn
from training import PLAIN, TINY, train, write

from kdkit import devices, plan, recipe
from kdkit.cost_table import subjects
from kdkit.errors import RecipeError
from kdkit.factory import ModelFactory
from kdkit.trained import TrainedRun

ACCELERATOR = torch.device("cuda")
SAFE = {"model": "resnet18", "stem": "small", "args": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}}


@pytest.mark.parametrize(("setting", "on_cpu", "on_accelerator"), [("auto", False, True), (True, True, True), (False, False, False)])
def test_auto_is_on_where_there_is_an_accelerator(tmp_path, setting, on_cpu, on_accelerator):
    spec = recipe.load(write(tmp_path, train={"channels_last": setting})).spec.train
    assert devices.is_channels_last(spec, torch.device("cpu")) is on_cpu
    assert devices.is_channels_last(spec, ACCELERATOR) is on_accelerator
    assert recipe.load(write(tmp_path)).spec.train.channels_last == "auto"


@pytest.mark.parametrize(
    ("convolution", "unsafe"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(4, 4, 1, stride=2, groups=4), False),
    ],
)
def test_which_convolutions_corrupt_memory(convolution, unsafe):
    network = nn.Sequential(nn.ReLU(), convolution)
    assert devices.unsafe_convolution(network) == ("1" if unsafe else None)


@pytest.mark.parametrize("section", ["student", "teacher"])
def test_channels_last_is_refused_where_it_corrupts_memory(tmp_path, section):
    on = {"train": {"channels_last": True, "device": "cpu"}}
    safe = {**PLAIN, "student": SAFE, "teacher": SAFE}
    assert plan.make(recipe.load(write(tmp_path, safe, **on))).student.parameters > 0
    path = write(tmp_path, {**safe, section: TINY}, **on)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "channels_last" in text)
    with pytest.raises(RecipeError) as raised:
        plan.make(recipe.load(path))
    (says,) = str(raised.value).splitlines()
    assert says.startswith(f"{path}:{line}: train.channels_last: on the CPU") and f"of {section}" in says and "`auto` or `false`" in says


def test_what_is_not_a_setting_is_told_with_those_that_are(tmp_path):
    with pytest.raises(RecipeError, match=r"train.channels_last: got 'yes please'; allowed: auto, false, true$"):
        recipe.load(write(tmp_path, train={"channels_last": "yes please"}))


@pytest.mark.parametrize("setting", ["auto", True])
def test_training_measuring_and_profiling_follow_one_answer(tmp_path, setting):
    train(tmp_path, {**PLAIN, "student": SAFE, "teacher": SAFE}, train={"channels_last": setting, "epochs": 1})
    run = TrainedRun(tmp_path / "run")
    trained = ModelFactory(run.recipe, run.info, {}, device=torch.device("cpu"))
    profiled = subjects([str(tmp_path / "run")], None, None, torch.device("cpu"))
    models = [trained.student(), trained.teacher(), run.student(), *run.teachers(), *(one.model for one in profiled)]
    for model in models:
        weight = model.module.get_submodule("layer2.0.conv1").weight
        on = weight.is_contiguous(memory_format=torch.channels_last)
        assert (model.channels_last, on) == (setting is True,) * 2, model.role


SHORTER = [(r"\bepochs: \d+", "epochs: 1"), (r"warmup_epochs: \d+", "warmup_epochs: 0"), (r"train_samples: \d+", "train_samples: 50")]
SHORTER += [(r"snapshots: \d+", "snapshots: 1"), (r"anchors: \[.*?\]", "anchors: [1]"), (r"batch_size: \d+", "batch_size: 10")]
TRAIN_EACH = """
import sys, torch, kdkit
torch.set_num_threads(1)
for path in sys.argv[1:]:
    print(path, flush=True)
    kdkit.train(path, quiet=True)
"""


@pytest.mark.parametrize("pattern", ["*.yaml", pytest.param("*/*.yaml", marks=pytest.mark.slow)])
def test_the_recipes_of_digits_on_a_processor_without_avx512(tmp_path, pattern):
    """oneDNN then takes other code, as it does on most desktops; a crash there ends the process."""
    shutil.copytree(RECIPES / "digits", tmp_path / "digits")
    for path in tmp_path.rglob("*.yaml"):
        text = path.read_text()
        for found, instead in SHORTER:
            text = re.sub(found, instead, text)
        path.write_text(text)
    no_runs = ("base.yaml", "knowledge.yaml", "alpha.yaml")
    paths = [str(path) for path in sorted((tmp_path / "digits").glob(pattern)) if path.name not in no_runs]
    command = [sys.executable, "-c", TRAIN_EACH, *paths]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout.splitlines()[-1:], done.stderr)
    assert set(paths) <= set(done.stdout.splitlines()) and len(paths) > 4
