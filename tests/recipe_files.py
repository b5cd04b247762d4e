"""The recipes in a folder of their own, beside stand-ins for the files that some of them need: a plan reads little of those."""

import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PHOTOGRAPHS = {"train": 244, "val": 153}  # of ants and bees


def lay_out(home):
    """Copy `recipes/` into the folder and put weights, photographs and ImageNet's tree where the recipes look for them."""
    shutil.copytree(RECIPES, home / "recipes")
    photographs(home, PHOTOGRAPHS)
    for name in ("resnet18", "resnet50"):
        backbone(home, name, {"fc.bias": torch.zeros(100)})
    torch.save({"fc.bias": torch.zeros(100)}, home / "data" / "cifar100_resnet56-f2eff4c8.pt")
    for part, count in (("train", 13), ("val", 1)):  # ImageNet's classes with a hundredth of its files
        for label in range(1000):
            place = home / "data" / "imagenet" / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.JPEG").touch()
    return home / "recipes"


def photographs(home, counts):
    for part, count in counts.items():
        for i in range(count):
            place = home / "data" / "hymenoptera_data" / part / ("ants", "bees")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            value = 40 + 120 * (i % 2) + i
            Image.new("RGB", (40, 36), (value % 256, 90, 255 - value % 256)).save(place / f"{i}.jpg")


def backbone(home, name, weights):
    """A backbone of ants and bees, where its run would leave it."""
    place = home / "runs" / f"hymenoptera_backbone_{name}" / "student.safetensors"
    place.parent.mkdir(parents=True)
    save_file(weights, place)
