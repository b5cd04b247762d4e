"""The recipes in a folder of their own, beside stand-ins for the files that some of them need: of weights a plan reads the shapes."""

import json
import shutil
from pathlib import Path

import timm
import torch
from kdkit_plugins.models._cifar import registration  # noqa: F401 -- timm knows the CIFAR networks then
from PIL import Image
from safetensors.torch import save_file

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PHOTOGRAPHS = {"train": 244, "val": 153}  # of ants and bees


def lay_out(home):
    """Copy `recipes/` into the folder and put weights, photographs and ImageNet's tree where the recipes look for them."""
    shutil.copytree(RECIPES, home / "recipes")
    photographs(home, PHOTOGRAPHS)
    for name in ("resnet18", "resnet50"):
        hollow(backbone_file(home, name), name, num_classes=100)
    torch.save(shapes("cifar_resnet56", num_classes=100), home / "data" / "cifar100_resnet56-f2eff4c8.pt")
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
    save_file(weights, backbone_file(home, name))


def backbone_file(home, name):
    place = home / "runs" / f"hymenoptera_backbone_{name}" / "student.safetensors"
    place.parent.mkdir(parents=True)
    return place


def shapes(model, **arguments):
    """A network's weights without numbers."""
    with torch.device("meta"):
        return timm.create_model(model, **arguments).state_dict()


def hollow(path, model, **arguments):
    """A safetensors file of a network's names and shapes, whose numbers take no room on the disk."""
    header, end = {}, 0
    for name, value in shapes(model, **arguments).items():
        dtype, begin = {torch.float32: "F32", torch.int64: "I64"}[value.dtype], end
        end += value.nbytes
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
