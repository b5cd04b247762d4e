"""Folders of images: found, named, read, and refused with the file's name."""

import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from kdkit_plugins.datasets.image_folder import ImageFolder, ImageFolderOptions
from PIL import Image

from kdkit import plan, recipe
from kdkit.data import prepare
from kdkit.errors import DataError
from kdkit.schema import DataSpec, TimmAugment
from tests.training import PLAIN, merged
from tests.training import write as write_recipe

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
    return prepare(spec, source(root), seed=0, device=CPU)


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
def archive(root, tmp_path_factory):
    return packed(root, tmp_path_factory.mktemp("archive") / "insects.zip", "insects_1.0/")


@pytest.mark.parametrize("top", ["insects_1.0/", ""])
def test_an_archive_is_fetched_once(root, tmp_path_factory, top):
    folder = tmp_path_factory.mktemp("elsewhere")
    file = packed(root, folder / "insects.zip", top)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/._insects", "junk")
    options = {"url": file.as_uri(), "download": True}
    info = source(folder / "data" / "insects", **options).info()
    assert (info.num_train, info.num_test, info.class_names) == (8, 4, ("ant", "bee"))
    file.unlink()  # from here on there is nothing to fetch
    assert source(folder / "data" / "insects", **options).info() == info
    assert source(folder / "data" / "insects").split("train")[6][0].getpixel((0, 0)) == (102,) * 3
    assert os.listdir(folder / "data") == ["insects"]


def test_several_want_the_same_archive(archive, tmp_path):
    handler = type("Counting", (SimpleHTTPRequestHandler,), {"asked": [], "log_message": lambda self, *_: self.asked.append(self.path)})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=archive.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/insects.zip"
        with ThreadPoolExecutor(4) as pool:  # locks part threads that open the folder as they part processes
            wanted = [source(tmp_path / "data" / "insects", url=address, download=True) for _ in range(4)]
            found = list(pool.map(ImageFolder.info, wanted))
        server.shutdown()
    assert [info.num_train for info in found] == [8] * 4 and len(handler.asked) == 1


def test_without_download_nothing_is_fetched(archive, tmp_path):
    with pytest.raises(DataError, match="has none in it; `download: true` fetches it from file:") as raised:
        source(tmp_path / "data", url=archive.as_uri()).info()
    assert "\n" not in str(raised.value) and not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="`download: true` needs the `url` of a zip archive"):
        source(tmp_path, download=True)


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "..\\out.png"])
def test_an_archive_that_leads_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("train/ant/0.png", "")
        archive.writestr(name, "")
    refused(tmp_path, tmp_path / "w.zip", f"'{name}' would be written outside of")


def refused(folder, file, says):
    with pytest.raises(DataError) as raised:
        source(folder / "data" / "insects", url=file.as_uri() if hasattr(file, "as_uri") else file, download=True).info()
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert list((folder / "data").iterdir()) == [] and not (folder / "out.png").exists()


def test_what_cannot_be_fetched_is_told_in_one_line(archive, tmp_path):
    refused(tmp_path, tmp_path / "absent.zip", "insects cannot be fetched from file:")
    refused(tmp_path, "nonsense", "cannot be fetched from nonsense (ValueError: unknown url type")
    refused(tmp_path, "http://127.0.0.1:9/x.zip", "(URLError: ")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, archive, "(BadZipFile: ")
    archive.write_bytes(whole[:200].replace(b"IHDR", b"RDHI") + whole[200:])
    refused(tmp_path, archive, "(BadZipFile: Bad CRC-32")
    zipfile.ZipFile(archive, "w").close()
    refused(tmp_path, archive, "the archive is empty")


def test_where_it_comes_from_changes_no_run(archive, tmp_path):
    found = {"use": "image_folder", "root": str(tmp_path / "insects")}
    plain = {**PLAIN, "data": {"dataset": found, "image_size": 8, "batch_size": 2}, "teacher": None, "schedule": {"use": "supervised"},
             "losses": [{"use": "cross_entropy"}]}  # fmt: skip
    fetched = merged(plain, {"data": {"dataset": {"url": archive.as_uri(), "download": True}}})
    one, two = (recipe.load(write_recipe(tmp_path, each)) for each in (plain, fetched))
    assert one.fingerprint == two.fingerprint and not (tmp_path / "insects").exists()
    assert plan.make(two).info.class_names == ("ant", "bee")  # `kdkit check` has to fetch it


@pytest.mark.skipif("KDKIT_DATA" not in os.environ, reason="KDKIT_DATA names no folder with the real files")
def test_photographs():
    root = f"{os.environ['KDKIT_DATA']}/hymenoptera_data"
    settings = {"image_size": 64, "batch_size": 32, "timm_augment": TimmAugment(auto_augment="rand-m9-mstd0.5")}
    one, two = (load(root, workers, **settings) for workers in (0, 2))
    assert (one.info.num_train, one.info.num_test, one.info.class_names) == (244, 153, ("ants", "bees"))
    for left, right in zip(one.train.epoch(0), two.train.epoch(0), strict=True):
        assert torch.equal(left.inputs, right.inputs) and left.inputs.shape == (32, 3, 64, 64)
    assert sum(len(batch.labels) for batch in two.test) == 153
