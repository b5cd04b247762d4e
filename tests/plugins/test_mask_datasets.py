"""Datasets of images beside masks, on small files laid out as they are published."""

import numpy as np
import pytest
from kdkit_plugins.datasets._files import Files
from kdkit_plugins.datasets._masks import Masked
from PIL import Image
from pydantic import ValidationError

from kdkit.errors import DataError
from kdkit.recipe import registry
from kdkit.students.predictions import ImageFile, _Unlabelled

DATASETS = registry.load().datasets
COLORS = {"road": [128, 64, 128], "tree": [0, 128, 0]}


def picture(path, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)


def mask(path, values, size=(10, 8), form=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.array(values, np.uint8), (size[1], size[0], *np.shape(values)[1:]))
    image = Image.fromarray(pixels)
    if form == "P":
        image = image.convert("P")
        image.putdata(pixels.flatten().tolist())
    image.save(path)


def camvid(root):
    for part in ("train", "val", "test"):
        picture(root / part / "a.jpg")
        mask(root / f"{part}annot" / "a.png", [0, 10, 11])
    return {"root": root, "val": "leave"}


def voc(root):
    folder = root / "VOCdevkit" / "VOC2012"
    for part in ("train", "val"):
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text(part)
        picture(folder / "JPEGImages" / f"{part}.jpg")
        mask(folder / "SegmentationClass" / f"{part}.png", [0, 20, 255], form="P")
    return {"root": root}


def cityscapes(root):
    for part in ("train", "val"):
        picture(root / "leftImg8bit" / part / "aachen" / "aachen_0_0_leftImg8bit.png")
        mask(root / "gtFine" / part / "aachen" / "aachen_0_0_gtFine_labelIds.png", [0, 7, 33])
    return {"root": root}


def pets(root):
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"{part}.txt").write_text(f"{part}_1 1 1 1\n")
        picture(folder / "images" / f"{part}_1.jpg")
        mask(folder / "annotations" / "trimaps" / f"{part}_1.png", [1, 2, 3])
    return {"root": root}


def indexed(root):
    for part in ("train", "test"):
        picture(root / part / "images" / "a.jpg")
        mask(root / part / "masks" / "a_mask.png", [0, 1, 7])
    return {"root": root, "classes": ["road", "tree"], "ignore": [7], "mask_ending": "_mask"}


def colored(root):
    for part in ("train", "test"):
        picture(root / part / "images" / "a.jpg")
        mask(root / part / "masks" / "a.png", [*COLORS.values(), [0, 0, 0]])
    return {"root": root, "classes": COLORS, "ignore_colors": [[0, 0, 0]]}


LAYOUTS = {
    "camvid": (camvid, "camvid", 11, [0, 10, 255]),
    "voc": (voc, "voc_masks", 21, [0, 20, 255]),
    "cityscapes": (cityscapes, "cityscapes", 19, [0, 18, 255]),
    "pets": (pets, "pet_masks", 3, [0, 1, 2]),
    "indexed": (indexed, "mask_folder", 2, [0, 1, 255]),
    "colored": (colored, "mask_folder", 2, [0, 1, 255]),
}


@pytest.mark.parametrize(("lay_out", "name", "classes", "values"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout_is_read(lay_out, name, classes, values, tmp_path):
    source = DATASETS[name](DATASETS[name].Options(**lay_out(tmp_path)))
    info = source.info()
    assert (info.outputs, info.num_train, info.num_test) == (classes, 1, 1)
    assert len(set(info.class_names)) == classes and source.for_task(source.options) == "segmentation"
    for part in ("train", "test"):
        image, found = source.split(part)[0]
        assert image.mode in ("RGB", "L") and np.unique(found).tolist() == values


def test_validation_frames_of_camvid_are_trained_on_unless_left(tmp_path):
    source = DATASETS["camvid"]
    options = camvid(tmp_path)
    assert source(source.Options(**{**options, "val": "train"})).info().num_train == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": "nowhere"}, "nowhere: no such folder"),
        ({"mask_ending": "_other"}, "has no mask a_other.png for a.jpg"),
        ({"train": "train/masks"}, "train/masks: holds images and masks"),
    ],
)
def test_what_is_missing_is_named(changes, says, tmp_path):
    source = DATASETS["mask_folder"]
    with pytest.raises(DataError, match=says):
        source(source.Options(**{**indexed(tmp_path), **changes})).info()


def test_two_files_of_one_name_are_refused(tmp_path):
    source, options = DATASETS["mask_folder"], indexed(tmp_path)
    picture(tmp_path / "train" / "images" / "a.png")
    with pytest.raises(DataError, match="train/images: has a.jpg and a.png, of one name"):
        source(source.Options(**options)).info()


def test_a_colour_of_no_class_and_a_mask_in_colours_are_refused(tmp_path):
    source, options = DATASETS["mask_folder"], colored(tmp_path)
    with pytest.raises(DataError, match=r"a.png: a pixel has the colour \(0, 0, 0\), which is no class's"):
        source(source.Options(**{**options, "ignore_colors": []})).split("train")[0]
    with pytest.raises(DataError, match="this is of PIL's mode RGB; give the colours"):
        source(source.Options(root=tmp_path, classes=["road", "tree"])).split("train")[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"classes": ["a", "a"]}, "two classes have one name"),
        ({"classes": {"a": [1, 1, 1], "b": [1, 1, 1]}}, "two classes have one colour"),
        ({"classes": ["a", "b"], "ignore": [1]}, "ignore: 1 is the value of class 'b'"),
        ({"classes": COLORS, "ignore": [1]}, "masks in colours have `ignore_colors`"),
        ({"classes": ["a"], "ignore_colors": [[1, 1, 1]]}, "give the colours of `classes`, too"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        DATASETS["mask_folder"].Options(root=".", **options)


def test_an_orientation_is_not_applied_and_a_mask_that_is_turned_is_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(file, exif=exif)
    mask(tmp_path / "stored.png", [0, 1])
    mask(tmp_path / "turned.png", [0, 1], size=(8, 10))
    stored, turned = (Masked([(file, tmp_path / name)]) for name in ("stored.png", "turned.png"))
    assert stored[0][0].size == Files([file], [0])[0][0].size == _Unlabelled([ImageFile(file, file)])[0][0].size == (10, 8)
    with pytest.raises(DataError, match="a.jpg: lies on its side"):
        turned[0]


def test_files_that_are_not_there_are_told_in_one_line(tmp_path):
    for name in ("voc_masks", "cityscapes", "pet_masks"):
        with pytest.raises(DataError, match=f"dataset '{name}' cannot be read from") as error:
            DATASETS[name](DATASETS[name].Options(root=tmp_path)).info()
        assert "\n" not in str(error.value)
