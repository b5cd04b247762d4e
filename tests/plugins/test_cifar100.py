"""CIFAR-100 is read from its pickled batches."""

import os
import pickle

import numpy as np
import pytest
import torch
from kdkit_plugins.datasets.cifar100 import Cifar100, Cifar100Options
from torchvision.datasets import CIFAR100

from kdkit.errors import DataError

FILES = {"train": ["train"], "test": ["test"]}
META, NAMES = ("meta", "fine_label_names")


def test_reads_both_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)  # it knows the sums of the original files
    monkeypatch.setitem(CIFAR100.meta, "md5", None)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / META).write_bytes(pickle.dumps({NAMES: ["a", "b"]}))
    rng, written = np.random.default_rng(0), {"train": [], "test": []}
    for part, names in FILES.items():
        for name in names:
            rows, labels = rng.integers(0, 256, (3, 3072), dtype=np.uint8), rng.integers(0, 100, 3).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": rows, "fine_labels": labels}))
            written[part].append((rows, labels))
    source = Cifar100(Cifar100Options(root=tmp_path))
    for part, batches in written.items():
        found = source.split(part)
        expected = np.concatenate([rows for rows, _ in batches]).reshape(-1, *source.info().image_shape)  # channel by channel in the file
        assert torch.equal(found.images, torch.tensor(expected)) and found.images.is_contiguous()
        assert found.labels.tolist() == [label for _, labels in batches for label in labels]


def test_missing_files_name_the_folder_and_what_helps(tmp_path):
    with pytest.raises(DataError, match=f"'cifar100' cannot be read from {tmp_path} .*`download: true`") as raised:
        Cifar100(Cifar100Options(root=tmp_path)).split("train")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif("KDKIT_DATA" not in os.environ, reason="KDKIT_DATA names no folder with the real files")
@pytest.mark.filterwarnings("ignore:dtype\\(\\).*align")  # the original pickles and NumPy 2.4
def test_the_real_files():
    source = Cifar100(Cifar100Options(root=os.environ["KDKIT_DATA"]))
    info, train, test = source.info(), source.split("train"), source.split("test")
    assert train.labels.bincount().tolist() == [500] * info.num_classes and test.labels.bincount().tolist() == [100] * info.num_classes
    assert torch.allclose(train.images.double().mean((0, 2, 3)) / 255, torch.tensor([0.5071, 0.4865, 0.4409]).double(), atol=1e-4)
