"""CIFAR-10 is read from its pickled batches."""

import os
import pickle

import numpy as np
import pytest
import torch
from kdkit_plugins.datasets.cifar10 import Cifar10, Cifar10Options
from torchvision.datasets import CIFAR10

from kdkit.errors import DataError

FILES = {"train": ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"], "test": ["test_batch"]}
META, NAMES = ("batches.meta", "label_names")


def test_reads_both_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # it knows the sums of the original files
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / META).write_bytes(pickle.dumps({NAMES: ["a", "b"]}))
    rng, written = np.random.default_rng(0), {"train": [], "test": []}
    for part, names in FILES.items():
        for name in names:
            rows, labels = rng.integers(0, 256, (3, 3072), dtype=np.uint8), rng.integers(0, 10, 3).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
            written[part].append((rows, labels))
    source = Cifar10(Cifar10Options(root=tmp_path))
    for part, batches in written.items():
        found = source.split(part)
        expected = np.concatenate([rows for rows, _ in batches]).reshape(-1, *source.info().image_shape)  # channel by channel in the file
        assert torch.equal(found.images, torch.tensor(expected)) and found.images.is_contiguous()
        assert found.labels.tolist() == [label for _, labels in batches for label in labels]


def test_missing_files_name_the_folder_and_what_helps(tmp_path):
    with pytest.raises(DataError, match=f"'cifar10' cannot be read from {tmp_path} .*`download: true`") as raised:
        Cifar10(Cifar10Options(root=tmp_path)).split("train")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif("KDKIT_DATA" not in os.environ, reason="KDKIT_DATA names no folder with the real files")
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")  # the original pickles and NumPy 2.4
def test_the_real_test_part(monkeypatch):
    monkeypatch.setattr(CIFAR10, "train_list", [])  # so that a folder with the test part alone will do
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    source = Cifar10(Cifar10Options(root=os.environ["KDKIT_DATA"]))
    test = source.split("test")
    assert test.images.shape == (source.info().num_test, *source.info().image_shape)
    assert test.labels.bincount().tolist() == [1000] * 10
