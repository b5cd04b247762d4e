"""COCO's json as annotation tools export it: read with its classes and boxes, told of what is odd, refused where it is wrong."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from small_boxes import items, picture, source, turned
from training import PLAIN, task
from training import write as write_recipe

from kdkit import recipe
from kdkit.data.loaders import prepare
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec
from kdkit.runs.check_data import DataChecks
from kdkit.runs.check_report import Report

# ids neither begin at 0 nor come in order; image 3 has no box
CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "c.jpg", "width": 40, "height": 30},
    ],
    "categories": [{"id": 5, "name": "cell"}, {"id": 2, "name": "blob"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 2, "bbox": [1, 2, 10, 20], "iscrowd": 0},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0.5, 0, 4, 4]},
        {"id": 6, "image_id": 9, "category_id": 5, "bbox": ["3", "4", "5", "6"], "iscrowd": 1},
    ],
}
FOUND = [
    ([[0.5, 0, 4.5, 4]], [1], [False]),
    ([], [], []),
    ([[1, 2, 11, 22], [3, 4, 8, 10]], [0, 1], [False, True]),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, mode in (("a.jpg", "RGB"), ("sub/b.png", "L"), ("c.jpg", "L")):
        picture(folder / name, mode=mode)
    picture(folder / "turned.jpg", size=(40, 30), exif=turned())
    return folder


def changed(**changes):
    """The content with other lists; a change such as `annotations_0` is of one entry."""
    content = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        name, _, place = key.partition("_")
        if place:
            content[name][int(place)] |= value
        else:
            content[name] = value
    return content


def write(root, name, content):
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def dataset(root, images, train, test=CONTENT, **options):
    where = {"train_images": str(images), "test_images": str(images)}
    return source("coco_json", root=root, train=write(root, "train.json", train), test=write(root, "test.json", test), **where, **options)


def test_boxes_and_classes_in_the_order_of_ids(images, tmp_path):
    found = dataset(tmp_path, images, CONTENT)
    info = found.info()
    assert (info.image_shape, info.class_names, info.num_train, info.num_test) == ((3, 30, 40), ("blob", "cell"), 3, 3)
    assert items(found) == items(found, "test") == FOUND
    image, target = found.split("train")[1]
    assert image.mode == "RGB" and target["boxes"].shape == (0, 4)  # from a grey file
    assert (target["labels"].dtype, target["ignored"].dtype) == (torch.int64, torch.bool)
    assert found.notes() == [f"{part} images without a box: 1 of 3 (first: {images}/sub/b.png)" for part in ("training", "test")]
    assert found.for_task(found.options) == "detection" and {path.name for path in found.own_files()} == {
        *("train.json", "test.json", "a.jpg", "b.png", "c.jpg"),
    }


def test_images_lie_beside_their_annotations_where_nothing_else_is_said(tmp_path):
    # as Roboflow writes it
    for part in ("train", "valid"):
        picture(tmp_path / part / "a.jpg")
        one = changed(images=CONTENT["images"][:1], annotations=CONTENT["annotations"][1:2])
        write(tmp_path, f"{part}/_annotations.coco.json", one)
    names = {"train": "train/_annotations.coco.json", "test": "valid/_annotations.coco.json"}
    assert items(source("coco_json", root=tmp_path, **names), "test") == FOUND[:1]


def test_a_share_of_one_file_is_drawn_for_the_test(images, tmp_path):
    write(tmp_path, "all.json", CONTENT)
    found = source("coco_json", root=tmp_path, train="all.json", test=0.4, train_images=str(images))
    paths = {part: found.split(part).paths for part in ("train", "test")}
    assert len(paths["test"]) == 1 and sorted(paths["train"] + paths["test"]) == sorted(
        str(images / one["file_name"]) for one in CONTENT["images"]
    )
    write(tmp_path, "all.json", changed(images=CONTENT["images"][::-1]))
    again = source("coco_json", root=tmp_path, train="all.json", test=0.4, train_images=str(images))
    assert again.split("test").paths == paths["test"]
    write(tmp_path, "all.json", changed(images=CONTENT["images"][:1], annotations=[]))
    with pytest.raises(DataError, match=r"all\.json: too few images for a test part$"):
        source("coco_json", root=tmp_path, train="all.json", test=0.1, train_images=str(images)).info()
    with pytest.raises(ValidationError, match="test images that are drawn are in `train_images`"):
        source("coco_json", root=tmp_path, train="all.json", test=0.1, test_images="other")


@pytest.mark.parametrize(
    ("classes", "labels", "left_out"),
    [(("cell", "blob"), [[0], [], [1, 0]], 0), (("cell",), [[0], [], [0]], 1)],
)
def test_classes_are_chosen_and_ordered_by_name(classes, labels, left_out, images, tmp_path):
    more = changed(categories=[*CONTENT["categories"], {"id": 1, "name": "seen in one file"}])
    found = dataset(tmp_path, images, CONTENT, more, classes=classes)
    assert found.info().class_names == classes and [one[1] for one in items(found)] == labels
    told = [note for note in found.notes() if "of other classes than `classes` names, left out: 1 (first: " in note]
    assert len(told) == 2 * left_out  # of both parts


def test_boxes_that_are_left_out_or_clipped_are_told(images, tmp_path):
    boxes = [[5, 5, 0, 9], [5, 5, 9, -2], [40, 0, 5, 5], [-9, -9, 9, 4], [30, 20, 10.5, 10], [30, 20, 20, 30], [-3, 1, 5, 2]]
    annotations = [{"id": number, "image_id": 7, "category_id": 5, "bbox": box} for number, box in enumerate(boxes)]
    found = dataset(tmp_path, images, changed(annotations=annotations))
    assert items(found)[0] == ([[30, 20, 40, 30], [30, 20, 40, 30], [0, 1, 2, 3]], [1, 1, 1], [False] * 3)
    file = tmp_path / "train.json"
    assert [note for note in found.notes() if not note.startswith("test ")] == [
        f"training boxes without an area, left out: 2 (first: {file}: annotation 0)",
        f"training boxes outside their images, left out: 2 (first: {file}: annotation 2)",
        f"training boxes that reach beyond their images, clipped: 2 (first: {file}: annotation 5)",
        f"training images without a box: 2 of 3 (first: {images}/sub/b.png)",
        "classes without a training box: blob",
    ]


def test_sizes_decide_the_shape_and_must_be_those_of_the_files(images, tmp_path):
    assert dataset(tmp_path, images, changed(images_0={"width": 30})).info().image_shape == (3, 0, 0)
    untold = changed(**{f"images_{place}": {"width": None} for place in range(3)})
    found = dataset(tmp_path, images, untold, untold)
    assert found.info().image_shape == (3, 30, 40) and items(found) == FOUND
    other = dataset(tmp_path, images, changed(images_0={"width": 50})).split("train")
    with pytest.raises(DataError, match=r"a\.jpg: is 40 x 30 pixels, and 50 x 30 where its boxes are listed$"):
        other[0]
    upright = {"file_name": "turned.jpg", "width": 30, "height": 40}
    with pytest.raises(DataError, match=r"turned\.jpg: .* listed; its EXIF orientation says how to turn it: write its pixels upright"):
        dataset(tmp_path, images, changed(images_0=upright)).split("train")[0]


WRONG = {
    "no JSON": ("{", "is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "a list": ("[]", "has no list of `categories`; COCO's format of instances has images, annotations and categories"),
    "no annotations": (
        changed(annotations=None),
        "has no list of `annotations`; COCO's format of instances has images, annotations and categories",
    ),
    "no image": (changed(images=[]), "lists no image"),
    "no id": (changed(images_1={"id": None}), "images[1]: has no id"),
    "one id twice": (changed(images_1={"id": 9}), "two images have the id 9"),
    "one file twice": (changed(images_1={"file_name": "a.jpg"}), "images 7 and 3 are one file, '{images}/a.jpg'"),
    "no file name": (changed(images_1={"file_name": ""}), "image 3: has no file_name"),
    "missing images": (
        changed(images_0={"file_name": "x"}, images_2={"file_name": "d\\y"}),
        "2 of 3 image files do not exist: image 7 '{images}/x', image 9 '{images}/d/y'",
    ),
    "one name twice": (changed(categories_0={"name": "blob"}), "category 5 has the name of another one"),
    "no name": (changed(categories_0={"name": 5}), "category 5 has no name"),
    "unknown category": (
        changed(annotations_1={"category_id": 3}),
        "annotation 4: category_id 3 is that of no category; there are 2 'blob', 5 'cell'",
    ),
    "unknown image": (changed(annotations_1={"image_id": [7]}), "annotation 4: image_id [7] is that of no image"),
    "no box": (changed(annotations_1={"bbox": None}), "annotation 4: bbox None is no list of four numbers: x, y, width, height"),
    "three numbers": (
        changed(annotations_1={"bbox": [1, 2, 3]}),
        "annotation 4: bbox [1, 2, 3] is no list of four numbers: x, y, width, height",
    ),
    "infinite": (
        changed(annotations_1={"bbox": [1, 2, 3, float("inf")]}),
        "annotation 4: bbox [1, 2, 3, inf] is no list of four numbers: x, y, width, height",
    ),
    "a crowd of words": (changed(annotations_1={"iscrowd": "some"}), "annotation 4: iscrowd is neither 0 nor 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_faulty_file_is_refused_in_one_line(name, images, tmp_path):
    content, says = WRONG[name]
    found = dataset(tmp_path, images, content)
    with pytest.raises(DataError) as raised:
        found.info()
    assert str(raised.value) == f"{tmp_path / 'train.json'}: {says.format(images=images)}"
    assert [path.name for path in found.own_files()] == ["train.json", "test.json"]


@pytest.mark.parametrize(
    ("categories", "options", "says"),
    [
        ([{"id": 1, "name": "cell"}], {}, "test.json: has no category 'blob'; it has: cell"),
        (
            [{"id": 1, "name": "cell"}, {"id": 2, "name": "blob"}, {"id": 3, "name": "dust"}],
            {},
            "test.json: category 'dust' is not in {root}/train.json, which has: blob, cell; `classes` chooses some",
        ),
        (CONTENT["categories"], {"classes": ["cell", "blop"]}, "train.json: has no category 'blop'; it has: blob, cell"),
    ],
)
def test_categories_that_do_not_agree_are_refused(categories, options, says, images, tmp_path):
    with pytest.raises(DataError) as raised:
        dataset(tmp_path, images, CONTENT, changed(categories=categories, annotations=[]), **options).info()
    assert str(raised.value) == f"{tmp_path}/{says.format(root=tmp_path)}"


def test_the_same_names_with_other_ids_are_the_same_classes(images, tmp_path):
    content = changed(categories=[{"id": "x", "name": "blob"}, {"id": 0, "name": "cell"}], annotations_0={"category_id": "x"})
    for place in (1, 2):
        content["annotations"][place]["category_id"] = 0
    assert items(dataset(tmp_path, images, CONTENT, content), "test") == FOUND


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: no such file$"):
        source("coco_json", root=tmp_path, train="gone.json", test=0.2).info()


@pytest.mark.parametrize("workers", [0, 1])
def test_boxes_are_read_by_workers(workers, images, tmp_path):
    spec = DataSpec(dataset={"use": "coco_json"}, batch_size=3, image_size=[60, 80], workers=workers)
    loaded = prepare(spec, dataset(tmp_path, images, CONTENT), task("detection"), seed=0, device=torch.device("cpu"))
    (batch,) = loaded.test
    assert batch.inputs.shape == (3, 3, 60, 80)
    assert batch.labels[0].tolist() == [[1, 0, 9, 8, 1, 0], [-1] * 6] and batch.labels[2].tolist() == [
        [2, 4, 22, 44, 0, 0],
        [6, 8, 16, 20, 1, 1],
    ]


def test_a_check_tells_what_a_dataset_notes(images, tmp_path):
    dataset(tmp_path, images, CONTENT)
    options = {"use": "coco_json", "root": str(tmp_path), "train": "train.json", "test": "test.json"}
    options |= {"train_images": str(images), "test_images": str(images)}
    given = {
        **PLAIN,
        "data": {"dataset": options, "batch_size": 2},
        "losses": [{"use": "detector"}],
        "schedule": {"use": "supervised"},
        "teacher": None,
    }
    loaded = recipe.load(write_recipe(tmp_path, given))
    report = Report(loaded, fetches=False)
    DataChecks(loaded, report, None).info(loaded.dataset())
    assert report.notes == loaded.dataset().notes() != []


CROWD = {**CONTENT["annotations"][0], "iscrowd": 1}
FLAT = {**CONTENT["annotations"][0], "bbox": [1, 2, 10, 0]}


@pytest.mark.parametrize("annotations", [[], [CROWD], [FLAT, CROWD]], ids=["none", "crowd", "flat"])
def test_a_test_part_in_which_no_box_counts_is_refused_before_training(annotations, images, tmp_path):
    found = dataset(tmp_path, images, CONTENT, changed(annotations=annotations))
    assert found.info().num_test == len(found.split("train")) == 3  # whose images may be unlabelled ones
    with pytest.raises(DataError) as refused:
        found.split("test")
    assert (
        str(refused.value) == "dataset 'coco_json': `test`: none of its 3 images has a box that counts, so that nothing could be measured"
    )


def test_a_box_that_is_listed_twice_is_told(images, tmp_path):
    again = [*CONTENT["annotations"], {**CONTENT["annotations"][0], "id": 8}]
    notes = dataset(tmp_path, images, changed(annotations=again)).notes()
    assert f"training boxes listed twice, both kept: 1 (first: {tmp_path}/train.json: annotation 8)" in notes
    assert not any("test boxes listed twice" in note for note in notes)


def checked(tmp_path, found):
    """What a check says of a dataset's labels."""
    given = {"data": {"dataset": {"use": "coco_json", **found.options.model_dump(mode="json", exclude_none=True)}}}
    given |= {"losses": [{"use": "detector"}], "schedule": {"use": "supervised"}, "teacher": None}
    loaded = recipe.load(write_recipe(tmp_path, {**PLAIN, **given}))
    checks, source = DataChecks(loaded, Report(loaded, fetches=False), None), loaded.dataset()
    checks.check_labels(source, checks.info(source))


def test_a_check_refuses_images_of_16_bits_and_parts_without_boxes(images, tmp_path):
    checked(tmp_path, dataset(tmp_path, images, CONTENT))
    with pytest.raises(DataError, match="none of its 3 images has a box that counts"):
        checked(tmp_path, dataset(tmp_path, images, CONTENT, changed(annotations=[])))
    picture(tmp_path / "wide" / "deep.png", mode="I;16")
    wide = changed(images_0={"file_name": str(tmp_path / "wide" / "deep.png")})
    with pytest.raises(DataError, match=r"deep\.png.*: its pixels are not of 8 bits \(PIL's mode I;16\)"):
        checked(tmp_path, dataset(tmp_path, images, wide))
