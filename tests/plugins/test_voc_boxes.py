"""Pascal VOC's layout: its pixels and difficult objects, and what is wrong in one line."""

import pytest
from small_boxes import items, picture, source, turned

from kdkit.errors import DataError

SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"
PART = "<part><name>tail</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"


def thing(name, *corners, more=""):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(*things, size=SIZE):
    return f"<annotation><filename>other.jpg</filename>{size}{''.join(things)}</annotation>"


# the first object fills its image; the parts of another are no objects
FILES = {
    "a": xml(thing(" dog ", 1, 1, 40, 30), thing("cat", 2.5, 3, 10, " 20 ", more=f"<difficult>1</difficult>{PART}")),
    "sub/b": xml(),
    "c": xml(thing("cat", 5, 6, 5, 7, more="<difficult>0</difficult>")),
}
FOUND = [([[0, 0, 40, 30], [1.5, 2, 10, 20]], [1, 0], [False, True]), ([], [], [])]


def lay_out(root, files=FILES, lists=(("train", "a\nsub/b\n"), ("test", "\ufeff\nc\n"))):
    for name, text in files.items():
        file = root / "Annotations" / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, text in lists:
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text, encoding="utf-8")
    for name in ("a.jpg", "sub/b.PNG", "c.jpeg"):
        picture(root / "JPEGImages" / name)
    return root


def test_boxes_in_the_pixels_of_voc(tmp_path):
    found = source("voc_boxes", root=lay_out(tmp_path))
    info = found.info()
    assert (info.image_shape, info.class_names, info.num_train, info.num_test) == ((3, 30, 40), ("cat", "dog"), 2, 1)
    assert items(found) == FOUND and items(found, "test") == [([[4, 5, 5, 7]], [0], [False])]
    assert found.notes() == [f"training images without a box: 1 of 2 (first: {tmp_path}/JPEGImages/sub/b.PNG)"]
    assert [path.name for path in found.own_files()] == ["train.txt", "test.txt", "a.xml", "b.xml", "c.xml", "a.jpg", "b.PNG", "c.jpeg"]


def test_pixels_may_be_counted_from_0_and_this_is_told_where_it_shows(tmp_path):
    files = {
        **FILES,
        "a": xml(thing("dog", 0, 5, 9, 9), thing("cat", 2, 0, 9, 9), thing("cat", 3, 3, 9, 9)),
        "c": xml(thing("cat", 5, 6, 5, 7), thing("cat", 1, 1, 9, 9)),
    }
    root = lay_out(tmp_path, files)
    found = source("voc_boxes", root=root, first_pixel=0)
    assert items(found)[0][0] == [[0, 5, 9, 9], [2, 0, 9, 9], [3, 3, 9, 9]] and items(found, "test") == [([[1, 1, 9, 9]], [0], [False])]
    told = f"boxes that begin at pixel 0: 2 (first: {root}/Annotations/a.xml: object 1); if the first pixel is 0, as most tools write, say `first_pixel: 0`"
    assert told not in found.notes() and told in source("voc_boxes", root=root).notes()
    assert f"test boxes without an area, left out: 1 (first: {root}/Annotations/c.xml: object 1)" in found.notes()


def test_lists_and_classes_are_chosen(tmp_path):
    root = lay_out(tmp_path, lists=(("trainval", "a\nc"), ("val", "sub/b")))
    found = source("voc_boxes", root=root, train="trainval", test="val", classes=["dog", "cow"])
    assert found.info().class_names == ("dog", "cow") and items(found) == [([[0, 0, 40, 30]], [0], [False]), ([], [], [])]
    assert "classes without a training box: cow" in found.notes()
    with pytest.raises(DataError, match=r"Main/test\.txt: no such file; lists there: trainval, val$"):
        source("voc_boxes", root=root, train="val").info()


def test_what_the_xml_says_of_the_size(tmp_path):
    upright = "<size><width>30</width><height>40</height></size>"
    root = lay_out(tmp_path, {**FILES, "c": xml(thing("cat", 1, 1, 9, 9), size=upright), "a": xml(size="<size><width>0</width></size>")})
    found = source("voc_boxes", root=root, classes=["cat"])
    assert found.info().image_shape == (3, 0, 0)
    assert items(found)[0] == ([], [], [])  # of a size that is not told
    with pytest.raises(DataError, match=r"c\.jpeg: is 40 x 30 pixels, and 30 x 40 where its boxes are listed$"):
        found.split("test")[0]
    picture(root / "JPEGImages" / "c.jpeg", exif=turned())
    with pytest.raises(DataError, match=r"c\.jpeg: .*; its EXIF orientation says how to turn it"):
        found.split("test")[0]


ENTITY = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>'
WRONG = {
    "damaged": ({"a": xml()[:-5]}, {}, "Annotations/a.xml: is no XML: "),
    "a reference to a file": (
        {"a": f"{ENTITY}<annotation><object><name>&e;</name></object></annotation>"},
        {},
        "Annotations/a.xml: is no XML: undefined entity",
    ),
    "no name": ({"a": xml(thing("", 1, 1, 2, 2))}, {}, "Annotations/a.xml: object 1: has no name"),
    "no number": (
        {"a": xml(thing("cat", 1, 1, 2, 2), thing("cat", 1, "nan", 2, 2))},
        {},
        "Annotations/a.xml: object 2: has no bndbox of four numbers: xmin, ymin, xmax, ymax",
    ),
    "how difficult": (
        {"a": xml(thing("cat", 1, 1, 2, 2, more="<difficult>very</difficult>"))},
        {},
        "Annotations/a.xml: object 1: difficult is neither 0 nor 1",
    ),
    "a class of the test alone": (
        {"c": xml(thing("cow", 1, 1, 2, 2))},
        {},
        "Annotations/c.xml: object 1: no training box has class 'cow'; they have: cat, dog",
    ),
    "no xml": ({}, {"train": "a\nd"}, "Annotations/d.xml: no such file; an image without objects has an xml file without `object`"),
    "missing images": (
        {},
        {"train": "a\n\nx -1"},
        "ImageSets/Main/train.txt: 1 of 2 image files do not exist: line 3 '{root}/JPEGImages/x -1.jpg'",
    ),
    "an empty list": ({}, {"test": "\n"}, "ImageSets/Main/test.txt: lists no image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_faulty_file_is_refused_in_one_line(name, tmp_path):
    files, lists, says = WRONG[name]
    root = lay_out(tmp_path, {**FILES, **files}, tuple({"train": "a", "test": "c", **lists}.items()))
    picture(root / "JPEGImages" / "d.jpg")
    with pytest.raises(DataError) as raised:
        source("voc_boxes", root=root).info()
    assert str(raised.value).startswith(f"{root}/{says.format(root=root)}") and "\n" not in str(raised.value)
