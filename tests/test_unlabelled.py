"""Training images without labels: only what reads none can be trained; test images are measured as ever."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdkit import recipe
from kdkit.errors import RecipeError
from kdkit.runs import checks, training

NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 training pictures in one folder, 6 test pictures in three; weights of a teacher."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for i in range(18):
        file = folder / "images" / ("train" if i < 12 else f"test/{NAMES[i % 3]}") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (80 * (i % 3), 5 * i, 0)).save(file)
    draw = torch.Generator().manual_seed(0)
    shapes = {"layer1.0.weight": (8, 192), "layer1.0.bias": (8,), "fc.weight": (3, 8), "fc.bias": (3,)}
    save_file({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, folder / "teacher.safetensors")
    return folder


def load(folder, **changes):
    content = {
        "name": "unlabelled",
        "data": {"dataset": {"use": "image_folder", "root": "images"}, "image_size": 8, "batch_size": 4, "workers": 0},
        "teacher": {"model": "mlp/8", "checkpoint": "teacher.safetensors"}, "student": {"model": "mlp/8"},
        "schedule": {"use": "offline"}, "losses": [{"use": "logit_kl"}, {"use": "rkd_distance", "layers": [{"student": "layer1", "teacher": "layer1"}]}],
        "train": {"epochs": 1, "optimizer": {"lr": 0.1}}, "run": {"folder": str(folder / "runs")},
    }  # fmt: skip
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and key in ("data", "train") else value
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return recipe.load(folder / "recipe.yaml")


def test_a_student_learns_unlabelled_from_the_teacher_alone(folder):
    result = training.train(load(folder, data={"train_samples": 8}), folder / "run", quiet=True)
    assert result.test.keys() >= {"top1", "agreement"} and result.parameters
    assert training.RunFolder(folder / "run").info().class_names == NAMES


LABELS = "reads the labels of training images, and they have none"
REFUSED = {
    "losses.0": ({"losses": [{"use": "cross_entropy"}, {"use": "logit_kl"}]}, LABELS),
    "losses.1": ({"losses": [{"use": "logit_kl"}, {"use": "dkd"}]}, LABELS),
    "losses.0 by its context": ({"losses": [{"use": "crd", "layers": [{"student": "layer1", "teacher": "layer1"}]}]}, LABELS),
    "schedule": ({"schedule": {"use": "cs_kd"}, "teacher": None, "losses": [{"use": "logit_kl"}]}, "by their labels, and they have none"),
    "data.validation": ({"data": {"validation": 4}}, "needs the labels of training images"),
    "data.sampling": ({"data": {"sampling": "balanced"}}, "needs the labels of training images"),
    "train.mixup": ({"train": {"mixup": {"mixup_alpha": 0.2}}}, "needs the labels of training images"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_losses_that_read_labels_of_unlabelled_data_are_one_line(folder, place):
    changes, says = REFUSED[place]
    with pytest.raises(RecipeError) as raised:
        checks.make(load(folder, **changes))
    assert f"recipe.yaml:1: {place.split()[0]}: " in str(raised.value) and says in str(raised.value)
    assert "\n" not in str(raised.value)
