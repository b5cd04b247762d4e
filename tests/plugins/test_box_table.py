"""Boxes that a table lists, one a row: read from CSV and Parquet, and refused by line."""

import pytest
from small_boxes import items, picture, source
from training import PLAIN
from training import write as write_recipe

from kdkit import recipe
from kdkit.errors import DataError

HEAD = "path,x0,y0,x1,y1,class\n"
TABLE = HEAD + "a.jpg,1,2,11,22.5,cat\nb.png,,,,,\na.jpg,3,4,8,10,ant\n"
FOUND = [([[1, 2, 11, 22.5], [3, 4, 8, 10]], [1, 0], [False, False]), ([], [], [])]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    picture(folder / "a.jpg")
    picture(folder / "b.png", mode="L")
    return folder


def table(root, text=TABLE, **options):
    (root / "t.csv").write_text(text)
    return source("box_table", train=root / "t.csv", **{"test": root / "t.csv", **options})


def test_one_row_for_each_box(images, tmp_path):
    found = table(tmp_path, images=images)
    info = found.info()
    assert (info.image_shape, info.class_names, info.num_train, info.num_test) == ((3, 30, 40), ("ant", "cat"), 2, 2)
    assert items(found) == items(found, "test") == FOUND and found.split("train")[1][0].mode == "RGB"
    assert found.notes() == [f"{part} images without a box: 1 of 2 (first: {images}/b.png)" for part in ("training", "test")]
    assert {path.name for path in found.own_files()} == {"t.csv", "a.jpg", "b.png"}


def test_other_columns_and_boxes_that_do_not_count(images, tmp_path):
    text = "file,left,top,right,bottom,kind,crowd\na.jpg,1,2,11,22.5,cat,\na.jpg,3,4,8,10,ant,1\nb.png,,,,,,0\n"
    names = {"path": "file", "corners": ["left", "top", "right", "bottom"], "class": "kind"}
    found = table(tmp_path, text, images=images, ignored="crowd", **names)
    assert items(found) == [(*FOUND[0][:2], [False, True]), FOUND[1]]
    assert [one[1] for one in items(table(tmp_path, text, images=images, classes=["cat"], **names))] == [[0], []]


def test_one_table_of_both_parts_beside_its_images(images):
    text = HEAD.replace("class", "class,split") + "a.jpg,1,2,11,22.5,cat,train\nb.png,0,0,9,9,cat,test\na.jpg,3,4,8,10,ant,train\n"
    found = table(images, text, test=None)
    assert items(found) == FOUND[:1] and items(found, "test") == [([[0, 0, 9, 9]], [1], [False])]
    with pytest.raises(DataError, match=r"t\.csv: line 3: 'a\.jpg' is of both splits, see line 4$"):
        table(images, text.replace("b.png", "a.jpg"), test=None).info()


def test_boxes_are_clipped_to_their_images_whose_headers_are_read(images, tmp_path):
    text = HEAD + "a.jpg,-5,-5,9,9,cat\na.jpg,40,0,44,9,cat\na.jpg,5,5,5,9,cat\n"
    found = table(tmp_path, text, images=images)
    assert items(found) == [([[0, 0, 9, 9]], [0], [False])]
    assert [note for note in found.notes() if note.startswith("training")] == [
        f"training boxes without an area, left out: 1 (first: {tmp_path}/t.csv: line 4)",
        f"training boxes outside their images, left out: 1 (first: {tmp_path}/t.csv: line 3)",
        f"training boxes that reach beyond their images, clipped: 1 (first: {tmp_path}/t.csv: line 2)",
    ]


def test_parquet_gives_what_csv_gives(images, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a.jpg", "b.png", "a.jpg"], "class": ["cat", None, "ant"]}
    edges = {"x0": [1, None, 3], "y0": [2, float("nan"), 4], "x1": [11, None, 8], "y1": [22.5, None, 10]}
    parquet.write_table(pa.table({**columns, **edges}), tmp_path / "t.parquet")
    file = tmp_path / "t.parquet"
    assert items(source("box_table", train=file, test=file, images=images)) == FOUND


BAD = {
    "no class": ("a.jpg,1,2,3,4,\n", {}, "line 5: column 'class' is empty; a row without a box has nothing in any"),
    "three edges": ("a.jpg,1,2,,4,cat\n", {}, "line 5: column 'x1' is empty; a row without a box has nothing in any"),
    "a class alone": ("a.jpg,,,,,cat\n", {}, "line 5: column 'x0' is empty; a row without a box has nothing in any"),
    "no number": ("a.jpg,1,2,3,4px,cat\n", {}, "line 5: column 'y1': '4px' is no finite number"),
    "neither": (
        "a.jpg,1,2,3,4,cat\n",
        {"ignored": "x0", "corners": ["y0", "y0", "x1", "y1"]},
        "line 4: column 'x0': '3' is neither 0 nor 1",
    ),
    "no path": (",1,2,3,4,cat\n", {}, "line 5: column 'path' is empty"),
    "missing": ("c.jpg,1,2,3,4,cat\nc.jpg,1,2,3,4,cat\n", {}, "1 of 3 image files do not exist: line 5 '{images}/c.jpg'"),
    "no column": (
        "",
        {"class": "Clas"},
        "has no column 'Clas', which `class` names; did you mean 'class'? it has: path, x0, y0, x1, y1, class",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_table_is_refused_in_one_line(name, images, tmp_path):
    rows, options, says = BAD[name]
    with pytest.raises(DataError) as raised:
        table(tmp_path, TABLE + rows, images=images, **options).info()
    assert str(raised.value) == f"{tmp_path / 't.csv'}: {says.format(images=images)}"


def test_a_class_of_the_test_table_alone_is_refused(images, tmp_path):
    (tmp_path / "test.csv").write_text(TABLE.replace("ant", "bee"))
    with pytest.raises(DataError, match=r"test\.csv: line 4: no training box has class 'bee'; they have: ant, cat$"):
        table(tmp_path, test=tmp_path / "test.csv", images=images).info()


def test_the_fingerprint_follows_boxes_and_images(tmp_path):
    for name in ("a.jpg", "b.png", "beside.png"):
        picture(tmp_path / name)
    options = {"use": "box_table", "train": "t.csv", "test": "t.csv"}
    given = {
        **PLAIN,
        "data": {"dataset": options, "batch_size": 2},
        "losses": [{"use": "detector"}],
        "teacher": None,
        "schedule": {"use": "supervised"},
    }
    path = write_recipe(tmp_path, given)
    prints = []
    for change in (
        lambda: table(tmp_path),
        lambda: picture(tmp_path / "beside.png", size=(9, 9)),
        lambda: picture(tmp_path / "a.jpg", size=(39, 30)),
        lambda: table(tmp_path, TABLE.replace("22.5", "22")),
    ):
        change()
        prints.append(recipe.load(path).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3
