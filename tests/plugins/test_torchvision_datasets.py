"""MNIST, Fashion-MNIST and the CIFARs are read from the original files' formats."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision.datasets
from kdkit_plugins.datasets.torchvision import Cifar10, Cifar100, FashionMnist, Mnist, SmallSetOptions

from kdkit.errors import DataError

SETS = [Mnist, FashionMnist, Cifar10, Cifar100]
BATCHES = {
    "CIFAR10": {
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
        "meta": "batches.meta",
        "names": "label_names",
        "labels": "labels",
    },
    "CIFAR100": {"train": ["train"], "test": ["test"], "meta": "meta", "names": "fine_label_names", "labels": "fine_labels"},
}
DATA = os.environ.get("KDKIT_DATA")
real = pytest.mark.skipif(DATA is None, reason="KDKIT_DATA names no folder with the real files")


@pytest.mark.parametrize("cls", [Mnist, FashionMnist])
def test_idx_files(tmp_path, cls):
    raw = tmp_path / cls.folder / "raw"
    raw.mkdir(parents=True)
    parts = {}
    for part, prefix, count in (("train", "train", 7), ("test", "t10k", 4)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        parts[part] = images, torch.arange(count) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.numpy().tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + parts[part][1].to(torch.uint8).numpy().tobytes()
        )
    source = cls(SmallSetOptions(root=tmp_path))
    for part, (images, labels) in parts.items():
        found = source.split(part)
        assert torch.equal(found.images[:, 0], images) and found.images.shape[1:] == source.info().image_shape
        assert torch.equal(found.labels, labels)


@pytest.mark.parametrize("cls", [Cifar10, Cifar100])
def test_pickled_batches(tmp_path, monkeypatch, cls):
    original, files = getattr(torchvision.datasets, cls.torchvision_name), BATCHES[cls.torchvision_name]
    monkeypatch.setattr(original, "_check_integrity", lambda self: True)  # it knows the sums of the original files
    monkeypatch.setitem(original.meta, "md5", None)
    folder = tmp_path / cls.folder
    folder.mkdir()
    (folder / files["meta"]).write_bytes(pickle.dumps({files["names"]: ["a", "b"]}))
    rng, written = np.random.default_rng(0), {"train": [], "test": []}
    for part, batches in written.items():
        for name in files[part]:
            rows, labels = rng.integers(0, 256, (3, 3072), dtype=np.uint8), rng.integers(0, 10, 3).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": rows, files["labels"]: labels}))
            batches.append((rows, labels))
    source = cls(SmallSetOptions(root=tmp_path))
    for part, batches in written.items():
        found = source.split(part)
        expected = np.concatenate([rows for rows, _ in batches]).reshape(-1, *source.info().image_shape)  # channel by channel in the file
        assert torch.equal(found.images, torch.tensor(expected)) and found.images.is_contiguous()
        assert found.labels.tolist() == [label for _, labels in batches for label in labels]


@pytest.mark.parametrize("cls", SETS)
def test_missing_files_name_the_folder_and_what_helps(tmp_path, cls):
    source = cls(SmallSetOptions(root=tmp_path))
    with pytest.raises(DataError, match=f"'{cls.name}' is not in {tmp_path}; `download: true` fetches"):
        source.info()
    (tmp_path / cls.folder).mkdir()
    with pytest.raises(DataError, match=f"'{cls.name}' cannot be read from {tmp_path} .*`download: true`") as raised:
        source.split("train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cls", SETS)
def test_a_dataset_that_can_be_downloaded_need_not_be_there(tmp_path, cls):
    source = cls(SmallSetOptions(root=tmp_path, download=True))
    assert source.info() == cls.facts
    assert str(source.lacks()) == f"{cls.torchvision_name} by torchvision to {tmp_path / cls.folder}"
    for file in cls.files:
        (tmp_path / cls.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / cls.folder / file).touch()
    assert source.lacks() is None


@real
@pytest.mark.parametrize("cls", [Mnist, FashionMnist, Cifar100])
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")  # the original pickles and NumPy 2.4
def test_the_real_files(cls):
    source = cls(SmallSetOptions(root=DATA))
    info, train, test = source.info(), source.split("train"), source.split("test")
    assert (len(train), len(test)) == (info.num_train, info.num_test)
    assert train.images.shape[1:] == test.images.shape[1:] == info.image_shape
    assert len(train.labels.unique()) == info.num_classes == (len(info.class_names) or 100)
    if cls is Cifar100:
        means = train.images.double().mean((0, 2, 3)) / 255
        assert torch.allclose(means, torch.tensor([0.5071, 0.4865, 0.4409]).double(), atol=1e-4)


@real
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")
def test_the_real_test_part_of_cifar10(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [])  # so that a folder with the test part alone will do
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", None]])
    test = Cifar10(SmallSetOptions(root=DATA)).split("test")
    assert test.images.shape == (10_000, 3, 32, 32) and test.labels.bincount().tolist() == [1000] * 10
