"""Folders of images: found, named, read, and refused with the file's name."""

import hashlib
import os
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kdkit_plugins.datasets import _archive
from kdkit_plugins.datasets.image_folder import ImageFolder, ImageFolderOptions
from PIL import Image
from training import PLAIN, task
from training import write as write_recipe

from kdkit import recipe
from kdkit.data.loaders import prepare
from kdkit.errors import DataError, RecipeError
from kdkit.recipe.data_section import DataSpec, TimmAugment
from kdkit.runs import checks

CPU = torch.device("cpu")


def write(folder, name, side=(10, 12), mode="RGB", value=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*side, 3), value, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(folder / name)


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / part / name, f"{i}.png", side=(10 + i, 12), value=100 * label + i)
    return tmp_path


def source(root, **options):
    return ImageFolder(ImageFolderOptions(root=root, **options))


def load(root, workers=0, **settings):
    spec = DataSpec(**{"dataset": {"use": "image_folder"}, "batch_size": 2, "image_size": 8, "workers": workers} | settings)
    return prepare(spec, source(root), task(), seed=0, device=CPU)


def test_info_lists_without_reading(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    info = source(root).info()
    assert (info.num_train, info.num_test, info.num_classes, info.class_names) == (8, 4, 2, ("ant", "bee"))


def test_items_are_the_files(root):
    train = source(root).split("train")
    assert list(train.labels) == [0] * 4 + [1] * 4
    image, label = train[6]
    assert (image.size, image.mode, label) == ((12, 12), "RGB", 1) and image.getpixel((0, 0)) == (102,) * 3


def test_test_folder_is_preferred_and_may_be_named(root):
    write(root / "test" / "ant", "only.png")
    write(root / "other" / "bee", "only.png")
    assert source(root).info().num_test == 1
    assert source(root, test="val").info().num_test == 4
    assert source(root, test="other").split("test").labels == [1]  # the class's number is that of training
    assert source(root, train="val").info().num_train == 4


def test_size_must_be_set(root):
    with pytest.raises(DataError, match="data.image_size: dataset 'image_folder'"):
        load(root, image_size=None)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_file_is_named(root, workers, part):
    path = root / part / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    loaded = load(root, workers)
    with pytest.raises(DataError, match=f"^{path}: cannot be read as an image: ") as raised:
        list(loaded.train.epoch(0) if part == "train" else loaded.test)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_colour_modes(root, mode):
    write(root / "train" / "ant", "0.png", mode=mode, value=50)
    batches = [b for b in load(root).train.epoch(0) if 0 in b.index]
    pixels = batches[0].inputs[batches[0].index == 0]
    assert pixels.shape == (1, 3, 8, 8) and torch.allclose(pixels, torch.tensor(50 / 255), atol=0.02)


def test_missing_folders_say_what_is_there(root, tmp_path):
    with pytest.raises(DataError, match=f"^{root / 'valid'}: no such folder; {root} has train, val$"):
        source(root, test="valid").info()
    with pytest.raises(DataError, match=f"^{root / 'nowhere' / 'train'}: no such folder; .* is no folder"):
        source(root / "nowhere").info()


def test_empty_and_unknown_class_folders(root):
    write(root / "val" / "wasp", "0.png")
    with pytest.raises(DataError, match=f"^{root / 'val' / 'wasp'}: no such class in {root / 'train'}$"):
        source(root).info()
    (root / "bare").mkdir()
    with pytest.raises(DataError, match=f"^{root / 'bare'}: has no folders"):
        source(root, train="bare").info()
    (root / "hollow" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=f"^{root / 'hollow'}: has no images"):
        source(root, test="hollow").info()


def packed(root, file, top=""):
    """A zip archive of a folder's files."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, f"{top}{path.relative_to(root)}")
    return file


@pytest.fixture
def served(tmp_path_factory):
    """A folder, its address on a server of its own, and the paths that were asked for."""
    asked = []
    handler = type("Counting", (SimpleHTTPRequestHandler,), {"log_message": lambda self, *_: asked.append(self.path)})
    folder = tmp_path_factory.mktemp("served")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(folder=folder, address=f"http://127.0.0.1:{server.server_port}", asked=asked)
        server.shutdown()


@pytest.fixture
def archive(root, served):
    return packed(root, served.folder / "insects.zip", "insects_1.0/")


def recipe_of(folder, **dataset):
    """A recipe in the folder, with its dataset in `insects` beside it."""
    found = {"use": "image_folder", "root": str(folder / "insects"), **dataset}
    return PLAIN | {
        "data": {"dataset": found, "image_size": 8, "batch_size": 2}, "teacher": None, "schedule": {"use": "supervised"},
        "losses": [{"use": "cross_entropy"}],
    }  # fmt: skip


@pytest.mark.parametrize("top", ["insects_1.0/", ""])
def test_an_archive_is_fetched_once(root, served, tmp_path_factory, top):
    folder = tmp_path_factory.mktemp("elsewhere")
    file = packed(root, served.folder / "insects.zip", top)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/train/._insects.png", "junk")
        archive.writestr("setup.py", "junk")
    options = {"url": f"{served.address}/insects.zip", "download": True, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    wanted = source(folder / "data" / "insects", **options)
    assert str(wanted.lacks()) == f"{served.address}/insects.zip to {folder / 'data' / 'insects'}"
    wanted.fetch()
    assert wanted.lacks() is None
    info = wanted.info()
    assert (info.num_train, info.num_test, info.class_names) == (8, 4, ("ant", "bee"))
    assert source(folder / "data" / "insects").split("train")[6][0].getpixel((0, 0)) == (102,) * 3
    assert os.listdir(folder / "data") == ["insects"] and sorted(os.listdir(folder / "data" / "insects")) == ["train", "val"]


def test_several_want_the_same_archive(archive, served, tmp_path):
    path = write_recipe(tmp_path, recipe_of(tmp_path, url=f"{served.address}/insects.zip", download=True))
    loaded, said = recipe.load(path), []
    with ThreadPoolExecutor(4) as pool:  # locks part threads that open the folder as they part processes
        found = list(pool.map(lambda _: checks.make(loaded, said.append), range(4)))
    assert [made.num_train for made in found] == [8] * 4 and len(served.asked) == 1
    assert said == [f"fetches {served.address}/insects.zip to {tmp_path / 'insects'}"]


def test_a_check_fetches_nothing(archive, served, tmp_path):
    path = write_recipe(tmp_path, recipe_of(tmp_path, url=f"{served.address}/insects.zip", download=True))
    with pytest.raises(RecipeError, match=r"data.dataset: is not there yet, .*; training first fetches http.*insects.zip to ") as raised:
        checks.make(recipe.load(path))
    assert "\n" not in str(raised.value) and not served.asked and not (tmp_path / "insects").exists()


def test_without_download_nothing_is_fetched(archive, served, tmp_path):
    plain = source(tmp_path / "data", url=f"{served.address}/insects.zip")
    with pytest.raises(DataError, match="has none in it; `download: true` fetches it from http:") as raised:
        plain.info()
    assert "\n" not in str(raised.value) and plain.lacks() is None
    with pytest.raises(ValueError, match="`download: true` needs the `url` of a zip archive"):
        source(tmp_path, download=True)
    for url in (archive.as_uri(), "ftp://host/x.zip", "/x.zip", "data:,"):
        with pytest.raises(ValueError, match=f"url: '{url}' begins with none of https://, http://"):
            source(tmp_path, url=url)


def refused(folder, address, says, **options):
    with pytest.raises(DataError) as raised:
        source(folder / "data" / "insects", url=address, download=True, **options).fetch()
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert list((folder / "data").iterdir()) == [] and not (folder / "out.png").exists()


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "..\\out.png"])
def test_an_archive_that_leads_outside_is_refused(served, tmp_path, name):
    with zipfile.ZipFile(served.folder / "w.zip", "w") as archive:
        archive.writestr("train/ant/0.png", "")
        archive.writestr(name, "")
    refused(tmp_path, f"{served.address}/w.zip", f"'{name}' would be written outside of")


def test_links_and_other_files_stay_in_the_archive(served, tmp_path):
    with zipfile.ZipFile(served.folder / "w.zip", "w") as archive:
        link = zipfile.ZipInfo("train/ant/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("usercustomize.py", "raise SystemExit")
        archive.writestr("train/ant/.hidden", "")
    wanted = source(tmp_path / "data", url=f"{served.address}/w.zip", download=True)
    wanted.fetch()
    (found,) = (path for path in (tmp_path / "data").rglob("*") if not path.is_dir())
    assert found.name == "link.png" and not found.is_symlink() and found.read_text() == "/etc/passwd"


def test_archives_that_are_too_large(served, tmp_path, monkeypatch):
    with zipfile.ZipFile(served.folder / "w.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/ant/0.png", bytes(3_000_000))
    address = f"{served.address}/w.zip"
    assert (served.folder / "w.zip").stat().st_size < 10_000
    refused(tmp_path, address, "has more than 0.002 GB, packed or unpacked; `max_gb` allows more", max_gb=0.002)
    refused(tmp_path, address, "has more than 1e-06 GB", max_gb=1e-6)
    monkeypatch.setattr(_archive, "MOST_FILES", 0)
    refused(tmp_path, address, "has 1 images, more than 0")


def test_what_cannot_be_fetched_is_told_in_one_line(archive, served, tmp_path):
    refused(tmp_path, f"{served.address}/absent.zip", "(HTTPError: HTTP Error 404")
    refused(tmp_path, "http://127.0.0.1:9/x.zip", "(URLError: ")
    address, whole = f"{served.address}/insects.zip", archive.read_bytes()
    refused(tmp_path, address, "is another archive: its SHA-256 is ", sha256="0" * 64)
    archive.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, address, "(BadZipFile: ")
    archive.write_bytes(whole[:200].replace(b"IHDR", b"RDHI") + whole[200:])
    refused(tmp_path, address, "(BadZipFile: Bad CRC-32")
    zipfile.ZipFile(archive, "w").close()
    refused(tmp_path, address, "the archive has no images")


def test_where_it_comes_from_changes_no_run(tmp_path):
    more = {"url": "http://127.0.0.1:9/x.zip", "download": True, "max_gb": 1, "sha256": "0" * 64}
    one, two = (recipe.load(write_recipe(tmp_path, recipe_of(tmp_path, **each))) for each in ({}, more))
    assert one.fingerprint == two.fingerprint


@pytest.mark.skipif("KDKIT_DATA" not in os.environ, reason="KDKIT_DATA names no folder with the real files")
def test_photographs():
    root = f"{os.environ['KDKIT_DATA']}/hymenoptera_data"
    settings = {"image_size": 64, "batch_size": 32, "timm_augment": TimmAugment(auto_augment="rand-m9-mstd0.5")}
    one, two = (load(root, workers, **settings) for workers in (0, 2))
    assert (one.info.num_train, one.info.num_test, one.info.class_names) == (244, 153, ("ants", "bees"))
    for left, right in zip(one.train.epoch(0), two.train.epoch(0), strict=True):
        assert torch.equal(left.inputs, right.inputs) and left.inputs.shape == (32, 3, 64, 64)
    assert sum(len(batch.labels) for batch in two.test) == 153


def test_a_share_of_each_class_is_drawn_by_name(tmp_path):
    for name, count in (("ant", 10), ("bee", 5), ("cow", 2)):
        for number in range(count):
            write(tmp_path / name, f"{number}.png")
    draw = lambda: ImageFolder(ImageFolderOptions(root=tmp_path, train=".", test=0.2))  # noqa: E731
    parts = {part: draw().split(part) for part in ("train", "test")}
    paths = {part: {*files.paths} for part, files in parts.items()}
    assert not paths["train"] & paths["test"]
    assert [parts["test"].labels.count(label) for label in range(3)] == [2, 1, 1]
    assert [parts["train"].labels.count(label) for label in range(3)] == [8, 4, 1]
    write(tmp_path / "ant", "more.png")  # the others stay where they are
    assert {*draw().split("test").paths} - paths["test"] <= {str(tmp_path / "ant" / "more.png")}
