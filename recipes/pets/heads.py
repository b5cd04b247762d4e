"""Write the pictures of pets' heads, and their tables, that the recipes beside this file read.

    python recipes/pets/heads.py data/pets

It writes, into that folder, `heads.csv` and `heads/` for regression, and `boxes.csv` for detection.

The folder is that of the Oxford-IIIT Pet dataset (Parkhi et al., "Cats and Dogs", CVPR 2012,
https://www.robots.ox.ac.uk/~vgg/data/pets) with `images/` and `annotations/xmls/`, or of a
selection with `images/` and `trainval.json`, a list of `{"image": NAME, "head": [x0, y0, x1, y1]}`.
Only training images of the dataset have heads: a third of them, drawn by a seed, is the test part.

A picture is a photograph, or a part of it, brought to 64 x 64; x0, y0, x1, y1 are shares of its
width and height. Crops and flips move a head, so they are made here, with their boxes: a training
photograph is there whole and in seven parts, every other one mirrored; a test photograph whole.

`boxes.csv` has the photographs themselves in the same two parts, with the head's box in pixels and
its class: names of files with cats begin with a capital letter, others are dogs.
"""

import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps

SIDE, PARTS, SMALLEST = 64, 7, 0.7  # pixels; of a photograph; of its width and height
Box = tuple[float, float, float, float]


def heads(root: Path) -> Iterator[tuple[str, Box]]:
    """Yield the file name of each image that has a head, and its box in pixels."""
    if (root / "trainval.json").is_file():
        for entry in json.loads((root / "trainval.json").read_text()):
            if entry["head"]:
                yield entry["image"], tuple(entry["head"])
        return
    for file in sorted((root / "annotations" / "xmls").glob("*.xml")):
        found = ElementTree.parse(file).find("object/bndbox")
        if found is not None:
            x0, y0, x1, y1 = (
                float(found.findtext(n, "nan")) for n in ("xmin", "ymin", "xmax", "ymax")
            )
            yield f"{file.stem}.jpg", (x0, y0, x1, y1)


def parts(width: int, height: int, head: Box, draw: random.Random) -> Iterator[Box]:
    """Yield random parts of an image that have the middle of its head in them."""
    for _ in range(PARTS):
        while True:
            w, h = (draw.uniform(SMALLEST, 1) * side for side in (width, height))
            left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
            across, down = (head[0] + head[2]) / 2 - left, (head[1] + head[3]) / 2 - top
            if 0 < across < w and 0 < down < h:
                yield left, top, left + w, top + h
                break


def shares(head: Box, part: Box) -> list[float]:
    """Return the head's box in shares of a part; where it goes beyond, it ends at the edge."""
    left, top, right, bottom = part
    x0, x1 = ((x - left) / (right - left) for x in (head[0], head[2]))
    y0, y1 = ((y - top) / (bottom - top) for y in (head[1], head[3]))
    return [round(min(max(share, 0.0), 1.0), 4) for share in (x0, y0, x1, y1)]


def pictures(root: Path, name: str, head: Box, split: str) -> Iterator[list[str | float]]:
    """Write the pictures of a photograph; yield their rows of the table."""
    draw = random.Random(name)
    with Image.open(root / "images" / name) as opened:
        image = opened.convert("RGB")
    places = [(0.0, 0.0, *map(float, image.size))]
    places += parts(*image.size, head, draw) if split == "train" else []
    for number, place in enumerate(places):
        picture, box = (
            image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, place),
            shares(head, place),
        )
        if number % 2:
            picture, box = ImageOps.mirror(picture), [1 - box[2], box[1], 1 - box[0], box[3]]
        path = f"heads/{Path(name).stem}-{number}.png"
        picture.save(root / path)
        yield [path, *(round(share, 4) for share in box), split]


def main(root: Path) -> None:
    """Write `heads/`, `heads.csv` and `boxes.csv` into the folder."""
    found = list(heads(root))
    if not found:
        sys.exit(f"{root}: has no heads: neither annotations/xmls/*.xml nor trainval.json")
    random.Random(0).shuffle(found)
    (root / "heads").mkdir(exist_ok=True)
    rows, boxes = [], []
    for place, (name, head) in enumerate(found):
        split = "test" if place < len(found) // 3 else "train"
        rows += pictures(root, name, head, split)
        boxes.append([f"images/{name}", *head, "cat" if name[0].isupper() else "dog", split])
    corners = ["x0", "y0", "x1", "y1"]
    write(root / "heads.csv", ["path", *corners, "split"], rows)
    write(root / "boxes.csv", ["path", *corners, "class", "split"], boxes)
    print(f"{root / 'heads.csv'} and boxes.csv: the heads of {len(found)} photographs")


def write(file: Path, columns: list[str], rows: list[list[str | float]]) -> None:
    """Write a table."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/pets"))
