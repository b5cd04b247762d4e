"""What a run's fingerprint covers beside its recipe: the files of the data, and code that other code imports."""

import os
import shutil

import pytest
import yaml
from PIL import Image
from training import PLAIN, train, write

import kdkit
from kdkit import recipe
from kdkit.recipe import dependencies
from kdkit.runs.folder import RunFolder

MODULES = {
    "net.py": "import blocks\nfrom pkg.deep import layer\nimport torch\n",
    "blocks.py": "import net, helper\nfrom . import beside\n",
    "helper.py": "",
    "beside.py": "",
    "pkg/__init__.py": "from .side import x\n",
    "pkg/deep.py": "",
    "pkg/side.py": "def x():\n    import lazy\n",
    "lazy.py": "",
    "stranger.py": "",
}


def tree(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_local_modules_are_found_however_they_are_imported(tmp_path):
    found = dependencies.local_modules(tree(tmp_path, MODULES) / "net.py")
    assert {str(path.relative_to(tmp_path)) for path in found} == set(MODULES) - {"net.py", "stranger.py"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_digest_of_code_covers_what_it_imports(tmp_path, name):
    file = tree(tmp_path, MODULES) / "net.py"
    before = dependencies.code_digest(file)
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert dependencies.code_digest(tmp_path / "elsewhere" / "net.py") == before
    with (tmp_path / name).open("a") as stream:
        stream.write("\nchanged = 1\n")
    assert (dependencies.code_digest(file) != before) == (name != "stranger.py")


@pytest.mark.parametrize("text", ["", "def broken(", "\0", "import nowhere"])
def test_the_digest_of_code_without_local_modules_is_the_file_s_own(tmp_path, text):
    file = tree(tmp_path, {"net.py": text}) / "net.py"
    assert dependencies.code_digest(file) == dependencies.file_digest(file)


def images(folder, size=4):
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for number in range(size):
                Image.new("RGB", (8, 8), (number, len(part), len(kind))).save(folder / part / kind / f"{number}.png")
    return folder


def replaced(file):
    """Other content of the same size, at the same time."""
    about, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "notices"),
    [
        (lambda root: os.utime(root / "train/cat/0.png", (1, 1)), False),
        (lambda root: (root / "train/.DS_Store").write_text("x"), False),
        (lambda root: (root / "train/cat/0.png").write_bytes(b"another"), True),
        (lambda root: (root / "train/cat/0.png").rename(root / "train/dog/9.png"), True),
        (lambda root: (root / "test/cat/0.png").unlink(), True),
        (lambda root: shutil.copy(root / "test/cat/0.png", root / "test/cat/7.png"), True),
    ],
    ids=["time", "hidden", "content", "name", "gone", "new"],
)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_the_digest_of_data_files(tmp_path, monkeypatch, large, change, notices):
    if large:
        monkeypatch.setattr(dependencies, "SMALL_FILES", 3)
    root = images(tmp_path / "images")
    folders = [root / "train", root / "test"]
    before = dependencies.files_digest(folders)
    shutil.copytree(root, tmp_path / "elsewhere" / "images", copy_function=shutil.copy)  # with other times
    assert dependencies.files_digest([tmp_path / "elsewhere" / "images" / part for part in ("train", "test")]) == before
    change(root)
    dependencies._of_large_sets.clear()  # another process
    assert (dependencies.files_digest(folders) != before) == notices


def test_the_digest_of_a_large_data_set_reads_a_part(tmp_path, monkeypatch):
    """What remains unseen: another content of the same size in a file that is not looked into."""
    root = images(tmp_path / "images")
    for name, value in (("SMALL_FILES", 3), ("SAMPLED", 2)):
        monkeypatch.setattr(dependencies, name, value)
    before = dependencies.files_digest([root])
    for name, seen in (("test/dog/1.png", False), ("test/cat/0.png", True)):  # the first of all is looked into
        replaced(root / name)
        dependencies._of_large_sets.clear()
        assert (dependencies.files_digest([root]) != before) == seen


def test_no_files_have_no_digest(tmp_path):
    assert dependencies.files_digest([]) is None and dependencies.files_digest([tmp_path]) is None


FOLDER = {
    **PLAIN,
    "data": {"dataset": {"use": "image_folder", "root": "images"}, "image_size": 8, "batch_size": 4},
    "teacher": None,
    "schedule": {"use": "supervised"},
    "losses": [{"use": "cross_entropy"}],
    "train": {"epochs": 1, "optimizer": {"lr": 0.05}},
}


def test_replaced_images_have_another_fingerprint(tmp_path):
    images(tmp_path / "images")
    train(tmp_path, FOLDER)
    before = (tmp_path / "run" / "result.json").read_bytes()
    train(tmp_path, FOLDER)
    assert (tmp_path / "run" / "result.json").read_bytes() == before, "trained already"
    (tmp_path / "images/test/cat/0.png").write_bytes((tmp_path / "images/test/dog/1.png").read_bytes())
    with pytest.raises(kdkit.RunError, match="holds a run of another recipe .different: the data's files"):
        train(tmp_path, FOLDER)
    shutil.rmtree(tmp_path / "images")
    train(tmp_path, FOLDER)  # a finished run whose data are gone
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_a_changed_module_that_a_network_s_file_imports_has_another_fingerprint(tmp_path):
    tree(tmp_path, {"net.py": "def f():\n    import blocks\n", "blocks.py": ""})
    plain = {key: value for key, value in PLAIN.items() if key != "teacher"}
    alone = {"schedule": {"use": "supervised"}, "losses": [{"use": "cross_entropy"}], "student": {"model": "python/f", "file": "net.py"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**plain, **alone}))
    before, older = recipe.load(path).fingerprint, recipe.load(path).older_fingerprint
    (tmp_path / "blocks.py").write_text("changed = 1")
    assert recipe.load(path).fingerprint != before and recipe.load(path).older_fingerprint == older


def test_the_fingerprint_of_an_older_kdkit_is_known(tmp_path):
    """Its fingerprint covers neither data files nor imported modules."""
    images(tmp_path / "images")
    loaded = recipe.load(write(tmp_path, FOLDER))
    assert loaded.older_fingerprint != loaded.fingerprint
    assert "files" in loaded.content()["data"] and "files" not in loaded.content(older=True)["data"]
    assert loaded.is_of(loaded.older_fingerprint, loaded.content(older=True))
    assert not loaded.is_of("another", loaded.content(older=True))
    assert recipe.load(write(tmp_path)).older_fingerprint == recipe.load(write(tmp_path)).fingerprint
    assert not RunFolder(tmp_path / "nothing").holds(loaded)
