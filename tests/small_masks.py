"""A folder of small images with masks, networks that answer pixels, and a recipe for both."""

import numpy as np
from PIL import Image
from training import merged
from training import write as write_recipe

CLASSES = ("ground", "left", "right")
HEIGHT, WIDTH = 12, 16
NETWORKS = """
from torch import nn

class Pixels(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, num_classes, 1)
        self.aux = nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        f = self.body(x)
        return {"out": self.head(f), "aux": self.aux(f)} if self.training else self.head(f)
"""
MAPS = [{"student": "body", "teacher": "body"}]
RECIPE = {
    "name": "masks",
    "data": {
        "dataset": {"use": "mask_folder", "root": ".", "classes": [*CLASSES], "ignore": [9]},
        "batch_size": 4,
        "joint_augment": {"scale": [0.8, 1.3], "crop": [8, 10], "flip": 0.5, "color_jitter": 0.2},
        "workers": 0,
    },
    "student": {"model": "python/Pixels", "file": "net.py"},
    "teacher": {"model": "python/Pixels", "file": "net.py", "args": {"width": 6}},
    "schedule": {"use": "offline"},
    "losses": [
        {"use": "cross_entropy"},
        {"use": "cross_entropy", "name": "aux", "output": 1, "weight": 0.4},
        {"use": "logit_kl"},
        {"use": "cwd", "layers": [{"student": "logits", "teacher": "logits"}]},
        {"use": "hint", "layers": MAPS},
    ],
    "train": {"epochs": 2, "optimizer": {"lr": 0.1}},
    "run": {"log_steps": 1, "checkpoint_steps": 1},
}


def lay_out(folder, train=12, test=6):
    """Bright squares left and right of the middle; one mask pixel in nine does not count (9)."""
    dice = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
        for number in range(count):
            pixels = dice.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            top, left = dice.integers(0, HEIGHT - 6), dice.integers(0, WIDTH - 6)
            mask[top : top + 6, left : left + 6] = 1 + (left >= WIDTH // 2 - 3)
            pixels[mask > 0] += 150
            mask[:: 1 + number % 3, ::3][dice.random(mask[:: 1 + number % 3, ::3].shape) < 0.5] = 9
            Image.fromarray(pixels).save(folder / part / "images" / f"{number:02}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{number:02}.png")
    (folder / "net.py").write_text(NETWORKS)
    return folder


def write(folder, file="recipe.yaml", **changes):
    """The recipe with changes, as a file in the folder."""
    return write_recipe(folder, merged(RECIPE, changes), file)
