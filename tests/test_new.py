"""`kdkit new`: what is written passes its check or its test; what is wrong is one line, and nothing is written."""

import csv
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

import kdkit
from kdkit import cli, recipe
from kdkit.errors import DataError
from kdkit.recipe import registry
from kdkit.start import datasets, plugins, tasks, writing
from kdkit.study import loading

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--size", "8", "--student", "mlp/8", "--teacher", "mlp/16")


@pytest.fixture
def new(tmp_path, monkeypatch, capsys):
    """`kdkit new` in an empty folder: exit code, and the lines that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kdkit", "new", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return caught.value.code or 0, (printed.out + printed.err).splitlines()

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def photos(folder):
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / part / kind).mkdir(parents=True)
            for number in range(16):
                Image.new("RGB", (9, 8), (number, 0, 0)).save(folder / part / kind / f"{number}.png")


def table(folder):
    """A table of the photos: a class, names of labels, two numbers."""
    photos(folder / "photos")
    found = sorted((folder / "photos").rglob("*.png"))
    rows = [
        [path.relative_to(folder), path.parent.name, "in;out" if i % 2 else "in", i, -i, path.parts[-3]] for i, path in enumerate(found)
    ]
    with (folder / "table.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "class", "seen", "x", "y", "split"], *rows])


def scenes(folder):
    for part in ("train", "test"):
        for kind in ("images", "masks"):
            (folder / "scenes" / part / kind).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (96, 64)).save(folder / "scenes" / part / "images" / f"{number}.png")
            mask = np.full((64, 96), number % 2, dtype="uint8")
            Image.fromarray(mask).save(folder / "scenes" / part / "masks" / f"{number}.png")


def cells(folder):
    for part in ("train", "test"):
        (folder / "cells" / part).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
        for number in range(8):
            Image.new("RGB", (96, 64)).save(folder / "cells" / part / f"{number}.jpg")
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 64})
            box = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
            content["annotations"].append({"id": number, "image_id": number, "category_id": 1, **box})
        (folder / "cells" / part / "_annotations.coco.json").write_text(json.dumps(content))


RECIPES = {  # task: what makes the data, further words, and a loss of the recipe
    "classification": (table, ("--images", "photos"), "logit_kl"),
    "classification of a table": (table, ("--images", "table.csv", "--loss", "hint"), "hint"),
    "multilabel": (table, ("--images", "table.csv", "--columns", "seen"), "mld"),
    "regression": (table, ("--images", "table.csv", "--columns", "x,y", "--loss", "rkd_angle"), "rkd_angle"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_passes_its_check(new, tmp_path, case):
    make, words, loss = RECIPES[case]
    make(tmp_path)
    before = files(tmp_path)
    code, lines = new("recipe", *words, "--task", case.split()[0], *SMALL)
    assert code == 0 and lines[:2] == ["recipe.yaml", "recipe-teacher.yaml"], lines
    assert lines[2].startswith("next: kdkit check recipe.yaml")
    assert files(tmp_path) == sorted([*before, "recipe.yaml", "recipe-teacher.yaml"])
    spec = recipe.load("recipe.yaml").spec  # the command has made its check
    assert [entry.use for entry in spec.losses[1:]] == [loss]
    assert recipe.load("recipe-teacher.yaml").spec.teacher is None
    if case == "classification":
        assert loss in kdkit.check("recipe.yaml").stages[0].formula


@pytest.mark.parametrize(("there", "section"), [("train", {"test": 0.2}), (".", {"train": ".", "test": 0.2})])
def test_a_test_part_is_drawn_where_there_is_none(new, tmp_path, there, section):
    photos(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos/train", tmp_path / "mine" / there)
    code, lines = new("recipe", "--images", "mine", *SMALL, "--batch-size", "8")
    assert code == 0, lines
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["dataset"] == {"use": "image_folder", "root": "mine", **section}
    info = kdkit.check("recipe.yaml").info
    assert (info.num_train, info.num_test, info.class_names) == (26, 6, ("cat", "dog"))


@pytest.mark.parametrize(
    ("student", "teacher", "keys"),
    [
        ("resnet10t", "mlp/8", {"model"}),
        ("mlp/8", "resnet10t", {"model", "pretrained"}),
        ("resnet10t", "torchvision/resnet18", {"model", "pretrained"}),
    ],
)
def test_networks_of_two_sources_have_their_own_keys(new, tmp_path, student, teacher, keys):
    photos(tmp_path / "photos")
    words = ("--student", student, "--teacher", teacher, "--size", "32", "--epochs", "2", "--from-scratch")
    code, lines = new("recipe", "--images", "photos", *words)
    assert code == 0, lines
    own, taught = recipe.load("recipe-teacher.yaml"), recipe.load("recipe.yaml")
    assert own.spec.student.model_fields_set == keys and own.spec.student.model == teacher
    assert (own.spec.data, own.spec.train) == (taught.spec.data, taught.spec.train)


TEXTS = {  # files: what `--texts` names, further words, and the section of the data
    ("t.csv",): ("t.csv", (), {"dataset": "csv", "files": {"train": "t.csv"}, "test": 0.2, "text": "sentence", "label": "intent"}),
    ("d/train.jsonl", "d/validation.jsonl"): (
        "d",
        ("--columns", "sentence,intent"),
        {"dataset": "json", "files": {"train": "d/train.jsonl", "test": "d/validation.jsonl"}, "text": "sentence", "label": "intent"},
    ),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("names", TEXTS, ids=lambda names: names[0])
def test_a_recipe_of_texts_passes_its_check(new, tmp_path, monkeypatch, names):
    pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from small_texts import NARROW, tokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer(tmp_path / "small")
    transformers.BertConfig(num_hidden_layers=1, **{**NARROW, "max_position_embeddings": 64}).save_pretrained(tmp_path / "small")
    rows = [{"sentence": f"word{i} word7", "intent": "yes" if i % 2 else "no"} for i in range(10)]
    for name in names:
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        lines = [json.dumps(row) if path.suffix == ".jsonl" else ",".join(row.values()) for row in rows]
        path.write_text("\n".join([*(["sentence,intent"] if path.suffix == ".csv" else []), *lines]) + "\n")
    path, words, section = TEXTS[names]
    model = ("--student", "hf/./small", "--teacher", "hf/./small", "--from-scratch")
    code, lines = new("recipe", "--texts", path, *words, *model, "--batch-size", "4")
    assert code == 0, lines
    usual = {"use": "hf_dataset", "max_length": 64, "tokenizer": "./small"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["dataset"] == {**usual, **section}
    info = kdkit.check("recipe.yaml").info
    assert info.class_names == ("no", "yes") and (info.num_train, info.num_test) == ((8, 2) if len(names) == 1 else (10, 10))


LARGE = {
    "segmentation": (scenes, ("--images", "scenes", "--classes", "ground,thing")),
    "detection": (cells, ("--images", "cells")),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", LARGE)
def test_a_recipe_of_masks_or_boxes_and_its_study_pass_their_checks(new, tmp_path, task):
    make, words = LARGE[task]
    make(tmp_path)
    small = ("--from-scratch", "--student", "resnet10t", "--teacher", "resnet10t", "--size", "64,96")
    assert new("recipe", "--task", task, *words, *small)[0] == 0
    assert kdkit.check("recipe.yaml").info.outputs == (2 if task == "segmentation" else 1)
    assert new("study", "--recipe", "recipe.yaml")[0] == 0
    assert [*yaml.safe_load((tmp_path / "study.yaml").read_text())["variants"]] == ["alone", "response", "feature", "relation"]


def test_a_study_has_each_kind_of_knowledge_that_the_recipe_allows(new, tmp_path):
    table(tmp_path)
    assert new("recipe", "--images", "photos", *SMALL, "--name", "mine", "--output", "sub/r.yaml")[0] == 0
    code, lines = new("study", "--recipe", "sub/r.yaml", "--seeds", "2")
    assert code == 0 and lines[0] == "study.yaml" and "--dry" in lines[1], lines
    study = loading.load([tmp_path / "study.yaml"])
    assert (study.name, study.baseline, study.seeds) == ("mine_knowledge", "alone", (0, 1))
    assert [*study.variants] == ["alone", "response", "feature", "relation"]


def test_a_teacher_is_a_recipe_or_a_file_of_weights(new, tmp_path):
    table(tmp_path)
    source = registry.load().models["mlp"]
    save_file(source(source.Options(model="mlp/16"), "16").build(2, (3, 8, 8)).state_dict(), weights := tmp_path / "w.safetensors")
    (tmp_path / "there.yaml").write_text(
        ALONE.replace("{dataset: {use: digits}", "{dataset: {use: image_folder, root: photos}, image_size: 8")
    )
    small = (*SMALL[:4], "--images", "photos")
    code, lines = new("recipe", *small, "--teacher", weights, "--teacher-model", "mlp/16", "--output", "w.yaml")
    assert code == 0 and lines[0] == "w.yaml" and not (tmp_path / "w-teacher.yaml").exists(), lines
    code, lines = new("recipe", *small, "--teacher", "there.yaml", "--output", "t.yaml")
    assert code == 0 and lines[0] == "t.yaml", lines
    assert new("recipe", *small, "--teacher", weights, "--output", "n.yaml") == (2, [NO_MODEL.format(weights)])
    assert not (tmp_path / "n.yaml").exists()


NO_MODEL = "--teacher-model: name the network whose weights {} holds"
WRONG = [  # the words of `kdkit new`, and a part of the one line
    (("recipe",), "--images is missing: folder or table"),
    (("recipe", "--images", "nowhere"), "--images: nowhere: no such folder or table"),
    (("recipe", "--images", "."), "has no folder 'train'; needed are train/CLASS/1.jpg"),
    (("recipe", "--images", "photos", "--texts", "table.csv"), "--texts: takes the place of --images"),
    (("recipe", "--texts", "nowhere"), "--texts: nowhere: no such folder or table"),
    (("recipe", "--texts", "photos"), "--texts: photos: needed is a table .csv, .json, .jsonl, .parquet"),
    (("recipe", "--texts", "table.csv"), "--columns: name the columns of table.csv that hold the texts and the labels"),
    (("recipe", "--images", "photos", "--task", "detect"), "--task: 'detect': did you mean 'detection'?"),
    (("recipe", "--images", "photos", "--task", "regression"), "regression needs a table"),
    (("recipe", "--images", "photos", "--task", "segmentation"), "--classes is missing: names of the classes"),
    (("recipe", "--images", "photos", "--task", "detection"), "has no json files"),
    (("recipe", "--images", "table.csv", "--task", "multilabel"), "it has: path, class, seen, x, y, split"),
    (("recipe", "--images", "photos", "--size", "a"), "--size: 'a' is neither a side"),
    (("recipe", "--images", "photos", "--output", "r.txt"), "--output: r.txt: write a file .yaml"),
    (("recipe", "--images", "photos", "--output", "there.yaml"), "there.yaml: exists already"),
    (("recipe", "--images", "photos", "--teacher", "no.pt"), "--teacher: no.pt: no such file"),
    (("recipe", "--images", "photos", *SMALL, "--loss", "hnit"), "did you mean 'hint'?"),
    (("recipe", "--images", "photos", *SMALL, "--loss", "mld"), "nothing is written"),
    (("recipe", "--images", "photos", "--teacher", "resnet18", "--student", "mobilnet"), "timm has no model 'mobilnet'"),
    (("recipe", "--images", "photos", *SMALL, "--name", "a/b"), "name: "),
    (("study",), "--recipe is missing"),
    (("study", "--recipe", "none.yaml"), "none.yaml: No such file"),
    (("study", "--recipe", "there.yaml"), "there.yaml: has no teacher"),
    (("loss",), "NAME is missing: name of the loss"),
    (("loss", "My-Loss"), "'My-Loss' is no name of a plugin"),
    (("loss", "random"), "'random' is a name of Python's"),
    (("loss", "mine", "--knowledge", "all"), "invalid value for '--knowledge'"),
    (("loss", "there"), "there.py: exists already"),
    (("package", "class"), "'class' is a name of Python's"),
    ((), "kdkit new: missing command"),
    (("los",), "no such command 'los'"),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "")
def test_what_is_wrong_is_one_line_and_nothing_is_written(new, tmp_path, words, says):
    if {"photos", "table.csv"} & {*words}:
        table(tmp_path)
    (tmp_path / "there.py").touch()
    (tmp_path / "there.yaml").write_text(ALONE)
    before = files(tmp_path)
    code, lines = new(*words)
    assert code == 2 and len(lines) == 1 and says in lines[0], lines
    assert files(tmp_path) == before


ALONE = """\
name: alone
data: {dataset: {use: digits}, batch_size: 16}
student: {model: mlp/8}
schedule: {use: supervised}
losses: [{use: cross_entropy}]
train: {epochs: 1, optimizer: {lr: 0.1}}
"""


def test_what_is_missing_is_asked_for_on_a_terminal(new, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda question: "asked_for")
    assert new("task")[0] == 0
    assert files(tmp_path) == ["asked_for.py", "test_asked_for.py"]


def run_tests_of(path, monkeypatch, tmp_path):
    """Call the functions of a test file, as pytest does; the number of them."""
    monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    tests = [getattr(module, name) for name in dir(module) if name.startswith("test_")]
    given = {"tmp_path": tmp_path / "of_the_test", "monkeypatch": monkeypatch}
    given["tmp_path"].mkdir()
    for test in tests:
        test(**{name: given[name] for name in inspect.signature(test).parameters})
    return len(tests)


PLUGINS = [
    pytest.param("schedule", "schedules", marks=pytest.mark.slow),  # trains
    ("task", "tasks"),
    ("dataset", "datasets"),
    ("loss response", "losses"),
    pytest.param("loss feature", "losses", marks=pytest.mark.slow),
    pytest.param("loss relation", "losses", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "kind"), PLUGINS)
def test_a_plugin_is_found_and_passes_its_test(new, tmp_path, monkeypatch, case, kind):
    what, _, knowledge = case.partition(" ")
    name = f"new_{case.replace(' ', '_')}"
    code, lines = new(what, name, *(["--knowledge", knowledge] if knowledge else []))
    assert code == 0 and lines == [f"{name}.py", f"test_{name}.py", f"next: python -m pytest test_{name}.py"]
    assert name in getattr(registry.load((tmp_path / f"{name}.py",)), kind)
    assert run_tests_of(tmp_path / f"test_{name}.py", monkeypatch, tmp_path) == 1


def test_a_package_names_its_plugin_and_passes_its_test(new, tmp_path, monkeypatch):
    code, lines = new("package", "new_pack", "--folder", "made")
    assert code == 0 and lines[-1] == "next: cd made && cd kdkit-new-pack && python -m pytest"
    root = tmp_path / "made" / "kdkit-new-pack"
    about = tomllib.loads((root / "pyproject.toml").read_text())
    assert about["project"]["entry-points"]["kdkit"] == {"new_pack": "kdkit_new_pack"}
    assert yaml.safe_load((root / ".github/workflows/tests.yml").read_text())["jobs"]
    monkeypatch.syspath_prepend(root)
    assert run_tests_of(root / "tests" / "test_new_pack.py", monkeypatch, tmp_path) == 1
    assert new("package", "new_pack", "--folder", "made")[0] == 2


BOXES = {  # the files of a folder: the section of its boxes
    ("ImageSets/Main/train.txt",): {"use": "voc_boxes", "first_pixel": 0},
    ("train/_annotations.coco.json", "test/_annotations.coco.json", "train/1.jpg"): {
        "train": "train/_annotations.coco.json",
        "test": "test/_annotations.coco.json",
    },
    ("train/a.json", "test/a.json", "valid/a.json"): {"train": "train/a.json", "test": "test/a.json"},
    ("train/a.json", "valid/a.json"): {"train": "train/a.json", "test": "valid/a.json"},
    ("annotations/instances_default.json", "images/default/1.jpg"): {
        "train": "annotations/instances_default.json",
        "test": datasets.TEST_SHARE,
        "train_images": "images/default",
    },
    ("result.json", "images/1.jpg"): {"train": "result.json", "test": datasets.TEST_SHARE, "train_images": "images"},
    ("a.json", "b.json"): None,
}


@pytest.mark.parametrize("there", BOXES, ids=lambda names: names[0])
def test_the_layout_of_boxes_is_found(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / "cells" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cells" / name).touch()
    images = datasets.Images(path := tmp_path / "cells", tmp_path)
    if BOXES[there] is None:
        with pytest.raises(DataError, match="has 2 json files, of which none is clearly"):
            datasets.section("detection", images)
    else:
        assert datasets.section("detection", images) == {"use": "coco_json", "root": path.as_posix(), **BOXES[there]}


def test_paths_begin_at_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert datasets.relative(tmp_path / "x", tmp_path) == str(tmp_path / "x")
    assert [datasets.relative(datasets.Path(word), tmp_path) for word in ("x", "../x")] == ["here/x", "x"]


VALUES = ["a", "no", "1e3", "a: b", "# a", "", "ä 'b'", '"', "~", "1", "a\nb", "../x", "[", "{", "*a", "y"]


@pytest.mark.parametrize("value", VALUES)
def test_any_value_is_written_as_itself(tmp_path, value):
    (tmp_path / "v.yaml").write_text(f"key: {writing.flow({'inner': [value, 0.2, 3, None, True]})}\n")
    assert yaml.safe_load((tmp_path / "v.yaml").read_text()) == {"key": {"inner": [value, 0.2, 3, None, True]}}


def test_every_template_is_used_and_every_task_is_known():
    there = {path.name.removesuffix(".template") for path in (datasets.Path(writing.__file__).parent / "templates").iterdir()}
    used = {"recipe.yaml", "teacher.yaml", "study.yaml"}
    for kind in plugins.KINDS.values():
        used |= {name.format(knowledge=one) for name in kind.files.values() for one in ("response", "feature", "relation")}
    assert there == used
    assert set(tasks.TASKS) <= set(registry.load().tasks)


def test_examples_are_listed_and_copied(new, tmp_path):
    code, printed = new("example")
    assert code == 0 and f"digits  {sum(1 for _ in (ROOT / 'recipes/digits').rglob('*.yaml'))} files" in printed
    code, printed = new("example", "digits", "--folder", "here")
    assert code == 0 and "here/recipes/digits/response.yaml" in printed
    copied = tmp_path / "here/recipes/digits"
    assert files(copied) == files(ROOT / "recipes/digits")
    assert kdkit.check(copied / "response.yaml").student.parameters > 0
    code, printed = new("example", "digits", "--folder", "here")
    assert (code, printed) == (2, ["here/recipes/digits/alone.yaml: exists already and is left as it is; nothing is written"])


def test_an_example_that_is_not_there_is_one_line(new, tmp_path):
    code, printed = new("example", "digit")
    assert code == 2 and printed[0].startswith("no example is called 'digit'; did you mean 'digits'?") and not files(tmp_path)


def test_the_wheel_holds_the_code_plugins_and_recipes(tmp_path):
    # a build leaves files beside its source
    for name in ("kdkit", "plugins", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    building = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(building, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"kdkit": "kdkit", "kdkit_plugins": "plugins", "kdkit_recipes": "recipes"}
    for package, folder in wanted.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".template", ".jinja", ".typed", ".pyi"):
                assert f"{package}/{path.relative_to(ROOT / folder)}" in held
