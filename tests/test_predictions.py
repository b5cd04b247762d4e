"""`kdkit predict`: what a student answers to image files, as tables, JSON and pictures."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kdkit
from kdkit import cli
from kdkit.files import sealed
from kdkit.students.export import export
from kdkit.students.loaded import LoadedRun
from kdkit.students.prediction_files import Pictures
from kdkit.students.predictions import ImageFile, find_images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network on three classes of nearly uniform pictures, trained until it tells them apart."""
    folder = tmp_path_factory.mktemp("pictures")
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "eel")):
            for i in range(6):
                file = folder / "images" / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (10 + i, 12), (100 * number, 5 * i, 0)).save(file)
    recipe = {
        "name": "pictures",
        "data": {"dataset": {"use": "image_folder", "root": "images"}, "image_size": 8, "batch_size": 6, "eval_batch_size": 4, "workers": 0},
        "student": {"model": "mlp/16"}, "schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}],
        "train": {"epochs": 20, "optimizer": {"lr": 0.1}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    kdkit.train(folder / "recipe.yaml", folder=folder / "run", quiet=True)
    return folder / "run"


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["kdkit", "predict", *map(str, words)])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code or 0


def test_predict_gives_each_file_its_class(run, monkeypatch, capsys):
    images = run.parent / "images" / "test"
    assert not command(monkeypatch, run, images)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [f"{name}/{i}.png" for name in ("cat", "dog", "eel") for i in range(6)]
    assert sum(row["class"] == row["file"].split("/")[0] for row in rows) >= 16
    assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)


def test_predict_writes_a_table_of_one_image(run, monkeypatch, capsys, tmp_path):
    image = run.parent / "images" / "test" / "dog" / "1.png"
    assert not command(monkeypatch, run, image, "--output", tmp_path / "table.csv")
    header, row = (tmp_path / "table.csv").read_text().splitlines()
    assert header == "file,class,probability" and row.startswith(f"{image},dog,0.")
    assert capsys.readouterr().out == f"1 images: {tmp_path / 'table.csv'}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no image files in it"), (b"nothing", "bad.png: cannot be read as an image")],
    ids=["empty folder", "broken file"],
)
def test_predict_of_what_cannot_be_read_is_one_line(run, monkeypatch, capsys, tmp_path, content, says):
    if content:
        (tmp_path / "bad.png").write_bytes(content)
    assert command(monkeypatch, run, tmp_path) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.png",), "nowhere.png: no such file or folder\n"),
        (("images/test", "--masks", "masks"), "--masks: its answers are no masks, but: class, probability\n"),
    ],
)
def test_predict_with_a_wrong_word_is_one_line(run, monkeypatch, capsys, words, says):
    monkeypatch.chdir(run.parent)
    assert command(monkeypatch, run, *words) == 2
    told = capsys.readouterr()
    assert told.err == says and not told.out and not (run.parent / "masks").exists()


def test_predict_of_images_of_another_size_is_one_line(run):
    with pytest.raises(kdkit.ModelError, match=r"student: takes images \(B, 3, 8, 8\), got \(B, 3, 9, 9\)"):
        kdkit.load_student(run)(torch.rand(2, 3, 9, 9))


def test_predict_writes_json_and_pictures_from_a_run_and_from_its_export(run, monkeypatch, capsys, tmp_path):
    test = run.parent / "images" / "test"
    assert not command(monkeypatch, run, test / "cat", test / "dog" / "1.png", "--output", tmp_path / "run.json")
    assert not command(monkeypatch, run, test / "cat", "--pictures", tmp_path / "drawn")
    found = json.loads((tmp_path / "run.json").read_text())
    assert [entry["file"] for entry in found] == [*(f"{i}.png" for i in range(6)), str(test / "dog" / "1.png")]
    assert found[-1]["class"] == "dog" and found[-1]["probability"] > 1 / 3
    with Image.open(tmp_path / "drawn" / "2.png") as picture:
        assert picture.width > 100
    export(LoadedRun(run), folder=tmp_path / "exported")
    assert not command(monkeypatch, tmp_path / "exported", test / "cat", test / "dog" / "1.png", "--output", tmp_path / "export.json")
    assert json.loads((tmp_path / "export.json").read_text()) == found
    assert command(monkeypatch, run, test, "--output", tmp_path / "run.txt") == 2
    assert "write a file .csv or .json" in capsys.readouterr().err


def named(*paths):
    return [ImageFile(Path(path), Path(name)) for path, name in paths]


@pytest.mark.parametrize(
    ("images", "files"),
    [
        (named(("a/1.jpg", "1.jpg"), ("b/2.jpg", "b/2.jpg")), ["1.png", "b/2.png"]),
        (named(("/x/1.jpg", "/x/1.jpg"), ("../2.jpg", "../2.jpg")), ["1.png", "2.png"]),
        (named(("/x/1.jpg", "/x/1.jpg"), ("/y/1.jpg", "/y/1.jpg")), ["x/1.png", "y/1.png"]),
        (named(("1.jpg", "1.jpg"), ("1.tif", "1.tif")), ["1.jpg.png", "1.tif.png"]),
    ],
    ids=["plain", "from elsewhere", "equal names", "equal stems"],
)
def test_each_image_has_a_picture_of_its_own(images, files):
    pictures = Pictures(Path("drawn"), "--pictures", images)
    assert [str(pictures.file(image.name)) for image in images] == [f"drawn/{file}" for file in files]


def test_images_of_one_name_are_told_apart(tmp_path):
    for place in ("a/1.png", "b/1.png", "b/2.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / place)
    found = find_images([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "2.png", tmp_path / "a"])
    assert [str(image.name) for image in found] == [str(tmp_path / "a" / "1.png"), str(tmp_path / "b" / "1.png"), "2.png"]


def test_predict_tells_of_turned_images_and_that_classes_have_no_least_score(run, monkeypatch, capsys, tmp_path):
    exif = Image.Exif()
    for number, orientation in enumerate((1, 6, 8)):
        exif[0x0112] = orientation
        Image.new("RGB", (12, 10)).save(tmp_path / f"{number}.jpg", exif=exif)
    assert not command(monkeypatch, run, tmp_path)
    assert capsys.readouterr().err == (
        "note: 2 of 3 images have an EXIF orientation, which is not applied: answers are of the pixels as they are stored"
        f" (first: {tmp_path}/1.jpg)\n"
    )
    assert command(monkeypatch, run, tmp_path, "--threshold", 0.5) == 2
    assert capsys.readouterr().err == "--threshold: task 'classification' does not choose by a score\n"


def test_an_export_of_before_does_not_say_how_images_are_prepared(run, monkeypatch, capsys, tmp_path):
    export(LoadedRun(run), folder=tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    own = {key: value for key, value in config["kdkit"].items() if key not in ("images", "sha256")}
    file.write_text(json.dumps({**config, "kdkit": sealed(own)}))
    assert command(monkeypatch, tmp_path, run.parent / "images" / "test") == 2
    assert "does not say how images are prepared, as an older kdkit has written it; export the run again" in capsys.readouterr().err
