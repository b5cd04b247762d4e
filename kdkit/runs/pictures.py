"""Pictures of images that a schedule has made, in the folder of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkit.files import write_atomically

FOLDER = "pictures"
SIDE = 64  # smallest side of an image in a picture, pixels
LARGEST = 20_000_000  # bytes of a picture that a report takes


def draw(folder: Path, stage: str, images: Mapping[str, Tensor]) -> None:
    """Write `pictures/STAGE-NAME.png` in a run's folder: images (N, C, H, W) in [0, 1], side by
    side.
    """
    for name, shown in images.items():
        path = folder / FOLDER / f"{stage}-{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, grid(shown))


def grid(images: Tensor) -> bytes:
    """Draw images side by side as PNG; those of other channels than 1 or 3 by their mean."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    times = max(1, -(-SIDE // min(images.shape[2:])))
    images = F.interpolate(images, scale_factor=times, mode="nearest")
    columns = max(1, round(len(images) ** 0.5))
    drawn = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
    stream = io.BytesIO()
    to_pil_image((drawn * 255).round().to(torch.uint8)).save(stream, "PNG")
    return stream.getvalue()


def drawn(folder: Path) -> dict[str, Path]:
    """Return the pictures in a run's folder by name."""
    return {path.stem: path for path in sorted((folder / FOLDER).glob("*.png"))}


def read(path: Path) -> bytes | None:
    """Return a picture's file; None if it is none, or too large."""
    from PIL import Image

    try:
        if path.stat().st_size > LARGEST:
            return None
        png = path.read_bytes()
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow raises all three
        return None
    return png
