"""The table of pets' heads: its boxes are where the heads are, in every picture."""

import csv
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from recipe_files import RECIPES
from small_boxes import source

HEADS = {"one": (80, 20, 140, 70), "two": (10, 60, 60, 119), "three": (100, 30, 199, 90), "four": (70, 40, 130, 90)}


@pytest.fixture
def root(tmp_path):
    """Photographs of 200 x 120 pixels with a red head."""
    (tmp_path / "images").mkdir()
    for name, box in HEADS.items():
        image = Image.new("RGB", (200, 120), (0, 0, 255))
        ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 0))
        image.save(tmp_path / "images" / f"{name}.jpg", quality=95)
    return tmp_path


def written(root):
    runpy.run_path(str(RECIPES / "pets" / "heads.py"))["main"](root)
    with (root / "heads.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def as_json(root):
    entries = [{"image": f"{name}.jpg", "head": box} for name, box in HEADS.items()]
    (root / "trainval.json").write_text(json.dumps([*entries, {"image": "none.jpg", "head": None}]))


def as_published(root):
    place = root / "annotations" / "xmls"
    place.mkdir(parents=True)
    for name, box in HEADS.items():
        corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        (place / f"{name}.xml").write_text(f"<annotation><object><bndbox>{corners}</bndbox></object></annotation>")


@pytest.mark.parametrize("form", [as_json, as_published])
def test_every_box_holds_the_head_of_its_picture(root, form, capsys):
    form(root)
    rows = written(root)
    assert "the heads of 4 photographs" in capsys.readouterr().out
    assert sorted(row["split"] for row in rows) == ["test"] + ["train"] * 24
    for row in rows:
        x0, y0, x1, y1 = (float(row[name]) * 64 for name in ("x0", "y0", "x1", "y1"))
        picture = Image.open(root / row["path"])
        assert picture.size == (64, 64)
        red = [(x, y) for x in range(64) for y in range(64) if picture.getpixel((x, y))[0] > 128]
        found = [min(x for x, _ in red), min(y for _, y in red), max(x for x, _ in red) + 1, max(y for _, y in red) + 1]
        assert all(abs(ours - theirs) < 2 for ours, theirs in zip(found, (x0, y0, x1, y1), strict=True)), row
    (whole,) = [row for row in rows if row["path"] == "heads/one-0.png"]
    assert [float(whole[name]) for name in ("x0", "y0", "x1", "y1")] == [0.4, 0.1667, 0.7, 0.5833]


def test_the_table_is_always_the_same_and_no_photograph_is_in_both_parts(root, capsys):
    as_json(root)
    rows = written(root)
    assert written(root) == rows
    parts = {split: {row["path"].partition("-")[0] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert len(parts["test"]) == 1 and len(parts["train"]) == 3 and not parts["train"] & parts["test"]


def test_the_boxes_of_photographs_are_in_the_same_parts(root, capsys):
    as_json(root)
    (root / "images" / "one.jpg").rename(root / "images" / "One.jpg")
    (root / "trainval.json").write_text((root / "trainval.json").read_text().replace("one.jpg", "One.jpg"))
    parts = {row["path"].removeprefix("heads/").partition("-")[0]: row["split"] for row in written(root)}
    found = source("box_table", train=root / "boxes.csv")
    assert found.info().class_names == ("cat", "dog")
    for part in ("train", "test"):
        split = found.split(part)
        names = [Path(path).stem for path in split.paths]
        assert sorted(names) == sorted(name for name in parts if parts[name] == part)
        for place, name in enumerate(names):
            target = split[place][1]
            assert (target["boxes"].tolist(), target["labels"].tolist()) == ([list(HEADS[name.lower()])], [int(name != "One")])


def test_a_folder_without_heads_is_told(root):
    with pytest.raises(SystemExit, match="has no heads: neither annotations/xmls"):
        written(root)
