"""Images that a table lists: read from CSV and Parquet, with their targets, and refused by line."""

import sys

import pytest
import torch
from kdkit_plugins.datasets.image_table import ImageTable, ImageTableOptions
from PIL import Image
from training import PLAIN, task
from training import write as write_recipe

from kdkit import recipe
from kdkit.data.loaders import prepare
from kdkit.errors import DataError, RecipeError
from kdkit.recipe.data_section import DataSpec

NAMES = [f"{number}.png" for number in range(4)]
CLASSES = ["cat", "ant", "cat", "bee"]
TAGS = ["wet;old", "", "old", " new ; wet;"]
WHERE = ["0.1", "-2", "3e-1", " 4 "]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        Image.new("RGB", (10, 8), (50 * number, 0, 0)).save(folder / name)
    return folder


def csv(path, columns, newline="\n", encoding="utf-8"):
    """A table of these columns of texts."""
    lines = [",".join(columns), *map(",".join, zip(*columns.values(), strict=True))]
    path.write_bytes((newline.join(lines) + newline).encode(encoding))
    return path


def source(train, **options):
    return ImageTable(ImageTableOptions(train=train, **{"test": train, **options}))


def test_a_class_for_each_image(images, tmp_path):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "class": CLASSES})
    test = csv(tmp_path / "test.csv", {"class": ["bee"], "path": ["3.png"]})
    found = source(train, test=test, images=images, **{"class": "class"})
    info = found.info()
    assert (info.image_shape, info.outputs, info.num_train, info.num_test) == ((3, 0, 0), 3, 4, 1)
    assert info.class_names == ("ant", "bee", "cat") and found.for_task(found.options) == "classification"
    assert list(found.split("train").labels) == [2, 0, 2, 1] and list(found.split("test").labels) == [1]
    image, label = found.split("train")[3]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (10, 8), (150, 0, 0), 1)


def test_labels_by_name_in_one_column(images, tmp_path):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "tags": TAGS})
    found = source(train, images=images, labels="tags")
    assert found.info().class_names == ("new", "old", "wet") and found.for_task(found.options) == "multilabel"
    assert found.split("train").labels.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]]
    other = csv(tmp_path / "other.csv", {"path": NAMES, "tags": [tags.replace(";", "|") for tags in TAGS]})
    assert torch.equal(source(other, images=images, labels="tags", separator="|").split("test").labels, found.split("test").labels)


def test_labels_and_numbers_in_columns_of_their_own(images, tmp_path):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "old": ["1", "0", "1", "0.5"], "wet": ["0", "1", "1.0", "0"], "x": WHERE})
    labels = source(train, images=images, labels=("wet", "old"))
    assert labels.info().class_names == ("wet", "old") and labels.for_task(labels.options) == "multilabel"
    assert labels.split("train").labels.tolist() == [[0, 1], [1, 0], [1, 1], [0, 0.5]]
    numbers = source(train, images=images, numbers=("x", "wet"))
    assert numbers.info().class_names == ("x", "wet") and numbers.for_task(numbers.options) == "regression"
    torch.testing.assert_close(numbers.split("test").labels[:, 0], torch.tensor([0.1, -2.0, 0.3, 4.0]))


def test_one_table_of_both_parts_beside_its_images(images):
    table = csv(images / "all.csv", {"path": NAMES, "kind": CLASSES, "split": ["train", "train", "test", "train"]})
    found = source(table, test=None, **{"class": "kind"})
    assert (found.info().num_train, found.info().num_test) == (3, 1)
    assert [path.rpartition("/")[2] for path in found.split("test").paths] == ["2.png"]


@pytest.mark.parametrize("form", [{"newline": "\r\n"}, {"encoding": "utf-8-sig"}, {"newline": "\r\n\r\n"}])
def test_what_spreadsheets_write(images, tmp_path, form):
    table = csv(tmp_path / "train.csv", {"path": [f'"{name}"' for name in NAMES], "class": ['"a, ""b"""', *CLASSES[1:]]}, **form)
    assert source(table, images=images, **{"class": "class"}).info().class_names == ('a, "b"', "ant", "bee", "cat")


def test_parquet_gives_what_csv_gives(images, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "path": NAMES,
        "class": CLASSES,
        "grade": [1, 0, 1, 1],
        "tags": [["wet", "old"], None, ["old"], ["new", "wet"]],
        "x": [0.1, -2.0, 0.3, 4.0],
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = csv(tmp_path / "t.csv", {**columns, "tags": TAGS, "x": WHERE, "grade": list("1011")})
    for wanted in ({"class": "class"}, {"class": "grade"}, {"labels": "tags"}, {"labels": ("grade",)}, {"numbers": ("x", "grade")}):
        ours, theirs = (source(path, images=images, **wanted) for path in (tmp_path / "t.parquet", table))
        assert ours.info() == theirs.info()
        torch.testing.assert_close(torch.as_tensor(ours.split("train").labels), torch.as_tensor(theirs.split("train").labels))
    parquet.write_table(pa.table({**columns, "x": [0.1, float("nan"), 1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: row 2: column 'x' is empty$"):
        source(tmp_path / "t.parquet", images=images, numbers=("x",)).info()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet: .+") as raised:
        source(tmp_path / "t.parquet", images=images, numbers=("x",)).info()
    assert "\n" not in str(raised.value)


def test_parquet_without_its_library_is_one_line(images, tmp_path, monkeypatch):
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"t\.parquet: Parquet needs pyarrow: pip install 'kdkit\[parquet\]'$"):
        source(tmp_path / "t.parquet", images=images, numbers=("x",)).info()


GOOD = "path,class,tags,x\n0.png,cat,wet,1\n"
BAD = {
    "empty class": (GOOD + "1.png,,wet,1\n", {"class": "class"}, "line 3: column 'class' is empty"),
    "empty path": (GOOD + ",cat,wet,1\n", {"class": "class"}, "line 3: column 'path' is empty"),
    "empty number": (GOOD + '1.png,"two\nlines",wet,\n', {"numbers": ("x",)}, "line 3: column 'x' is empty"),
    "a line after a cell of two": (
        GOOD + '1.png,"two\nlines",wet,1\n2.png,a,b,c',
        {"numbers": ("x",)},
        "line 5: column 'x': 'c' is no finite number",
    ),
    "NaN": (GOOD + "1.png,cat,wet,nan\n", {"numbers": ("x",)}, "line 3: column 'x': 'nan' is no finite number"),
    "too large for float32": (GOOD + "1.png,cat,wet,1e39\n", {"numbers": ("x",)}, "line 3: column 'x': '1e39' is no finite number"),
    "a comma": (GOOD + '1.png,cat,wet,"0,5"\n', {"numbers": ("x",)}, "line 3: column 'x': '0,5' is no finite number"),
    "an underscore": (GOOD + "1.png,cat,wet,1_0\n", {"numbers": ("x",)}, "line 3: column 'x': '1_0' is no finite number"),
    "a share above 1": (GOOD + "1.png,cat,wet,1.5\n", {"labels": ("x",)}, "line 3: column 'x': '1.5' is no number from 0 to 1"),
    "no label": ("path,tags\n0.png,\n", {"labels": "tags"}, "column 'tags' names no label"),
    "unknown column": (
        GOOD,
        {"class": "Clas"},
        "has no column 'Clas', which `class` names; did you mean 'class'? it has: path, class, tags, x",
    ),
    "semicolons": ("path;class\n0.png;cat\n", {"class": "class"}, "has semicolons between its cells; commas are read"),
    "no split": (
        GOOD,
        {"class": "class", "test": None},
        "has no column 'split', which says `train` or `test` where there is no table `test`; it has: path, class, tags, x",
    ),
    "other split": (
        "path,class,split\n0.png,a,train\n1.png,b,val\n",
        {"class": "class", "test": None},
        "line 3: split 'val'; allowed: train, test",
    ),
    "no test": ("path,class,split\n0.png,a,train\n", {"class": "class", "test": None}, "no row has the split 'test'"),
    "twice the same column": ("path,class,class\n0.png,a,b\n", {"class": "class"}, "has two columns 'class'"),
    "a short row": (GOOD + "1.png,cat\n", {"class": "class"}, "line 3: has 2 cells, and the first line 4"),
    "an open quote": (GOOD + '1.png,"cat,wet,1\n', {"class": "class"}, "line 3: is no CSV: unexpected end of data"),
    "no rows": ("path,class\n", {"class": "class"}, "has no rows"),
    "nothing": ("", {"class": "class"}, "has no column 'class', which `class` names; it has: none"),
    "no path": ("file,x\n0.png,1\n", {"numbers": ("x",)}, "has no column 'path', which `path` names; it has: file, x"),
    "missing files": (
        "path,class\n" + "".join(f"{name},cat\n" for name in ("0.png", "a", "b", "1.png", "c", "d")),
        {"class": "class"},
        "4 of 6 image files do not exist: line 3 '{images}/a', line 4 '{images}/b', line 6 '{images}/c', ...",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_table_is_refused_in_one_line(name, images, tmp_path):
    text, options, says = BAD[name]
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError) as raised:
        source(tmp_path / "t.csv", images=images, **options).info()
    assert str(raised.value) == f"{tmp_path / 't.csv'}: {says.format(images=images)}"


def test_a_class_or_label_of_the_test_table_alone_is_refused(images, tmp_path):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "class": CLASSES})
    test = csv(tmp_path / "test.csv", {"path": NAMES, "class": ["cat", "bee", "bea", "cat"]})
    for wanted, what in (({"class": "class"}, "class"), ({"labels": "class"}, "label")):
        with pytest.raises(DataError, match=rf"^{test}: line 4: {what} 'bea' is not in the training table, which has: ant, bee, cat$"):
            source(train, test=test, images=images, **wanted).info()


@pytest.mark.parametrize(
    ("wanted", "sign", "hint"),
    [
        ({"class": "kind"}, ",", "; for several labels in a cell: labels: kind, separator: ','"),
        ({"labels": "kind"}, "|", "; for several labels in a cell: separator: '|'"),
        ({"class": "kind"}, "-", ""),
    ],
)
def test_several_names_in_a_cell_are_told_as_such(images, tmp_path, wanted, sign, hint):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "kind": CLASSES})
    test = csv(tmp_path / "test.csv", {"path": NAMES[:1], "kind": [f'"cat{sign}ant"']})
    with pytest.raises(DataError) as raised:
        source(train, test=test, images=images, **wanted).info()
    assert str(raised.value).endswith(f"which has: ant, bee, cat{hint}")


def test_no_text_and_no_table(tmp_path):
    (tmp_path / "t.csv").write_bytes("päth".encode("utf-16"))
    with pytest.raises(DataError, match=r"t\.csv: is not UTF-8 text \(.+\)$"):
        source(tmp_path / "t.csv", numbers=("x",)).info()
    for name, says in (("t.xlsx", r"is no table; allowed: files that end in \.csv or \.parquet"), ("gone.csv", "no such file")):
        with pytest.raises(DataError, match=rf"{name}: {says}$"):
            source(tmp_path / name, numbers=("x",)).info()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give one of class, labels and numbers; given: none"),
        ({"class": "a", "numbers": ["b"]}, "give one of class, labels and numbers; given: class, numbers"),
        ({"numbers": []}, "numbers: name at least one column"),
        ({"labels": ["a", "b", "a"]}, "labels: column 'a' is named twice"),
    ],
)
def test_options_that_do_not_go_together(options, says, tmp_path):
    path = write_recipe(tmp_path, {**PLAIN, "data": {"dataset": {"use": "image_table", "train": "t.csv", **options}, "image_size": 8}})
    with pytest.raises(RecipeError, match=says):
        recipe.load(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_by_workers_with_their_targets(images, tmp_path, workers):
    train = csv(tmp_path / "train.csv", {"path": NAMES, "class": CLASSES})
    spec = DataSpec(dataset={"use": "image_table"}, batch_size=2, image_size=8, workers=workers)
    found = source(train, images=images, **{"class": "class"})
    loaded = prepare(spec, found, task(), seed=0, device=torch.device("cpu"))
    batch = next(iter(loaded.test))
    assert batch.labels.tolist() == [2, 0, 2, 1] and batch.inputs.shape == (4, 3, 8, 8)
    torch.testing.assert_close(batch.inputs[:, 0, 0, 0] * 255, torch.tensor([0.0, 50, 100, 150]))


@pytest.mark.parametrize(
    ("columns", "loss", "name"),
    [
        ({"class": "class"}, "cross_entropy", "classification"),
        ({"labels": "class"}, "bce", "multilabel"),
        ({"numbers": ["x"]}, "mse", "regression"),
    ],
)
def test_the_columns_decide_the_task_of_a_recipe(columns, loss, name, tmp_path):
    dataset = {"use": "image_table", "train": "t.csv", "test": "t.csv", **columns}
    plain = {**PLAIN, "data": {"dataset": dataset, "image_size": 8, "batch_size": 2}, "teacher": None, "schedule": {"use": "supervised"}}
    assert recipe.load(write_recipe(tmp_path, {**plain, "losses": [{"use": loss}]})).task.name == name
    asked = {**plain, "losses": [{"use": "cross_entropy"}], "task": "classification"}
    assert recipe.load(write_recipe(tmp_path, asked)).task.name == "classification"


def test_the_fingerprint_follows_tables_and_images(images, tmp_path):
    for name in NAMES:
        Image.open(images / name).save(tmp_path / name)
    csv(tmp_path / "t.csv", {"path": NAMES, "class": CLASSES})
    dataset = {"use": "image_table", "train": "t.csv", "test": "t.csv", "class": "class"}
    path = write_recipe(tmp_path, {**PLAIN, "data": {"dataset": dataset, "image_size": 8, "batch_size": 2}})
    prints = [recipe.load(path).fingerprint]
    (tmp_path / "beside.png").touch()
    assert recipe.load(path).fingerprint == prints[0]  # of what is listed only
    Image.new("RGB", (9, 8)).save(tmp_path / NAMES[0])
    prints.append(recipe.load(path).fingerprint)
    csv(tmp_path / "t.csv", {"path": NAMES, "class": sorted(CLASSES)})
    prints.append(recipe.load(path).fingerprint)
    assert len(set(prints)) == 3
