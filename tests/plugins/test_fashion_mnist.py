"""FashionMNIST is read from its idx files."""

import os
import struct
from pathlib import Path

import pytest
import torch
from kdkit_plugins.datasets.fashion_mnist import FashionMnist, FashionMnistOptions

from kdkit.errors import DataError


def write_idx(folder: Path, prefix: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """The two files of one part, in the format of the original ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.numpy().tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels.to(torch.uint8).numpy().tobytes())


def test_reads_both_parts(tmp_path):
    parts = {}
    for part, prefix, count in (("train", "train", 7), ("test", "t10k", 4)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        parts[part] = images, torch.arange(count) % 10
        write_idx(tmp_path / "FashionMNIST" / "raw", prefix, *parts[part])
    source = FashionMnist(FashionMnistOptions(root=tmp_path))
    for part, (images, labels) in parts.items():
        found = source.split(part)
        assert torch.equal(found.images[:, 0], images) and found.images.shape[1:] == source.info().image_shape
        assert torch.equal(found.labels, labels)


def test_missing_files_name_the_folder_and_what_helps(tmp_path):
    with pytest.raises(DataError, match=f"'fashion_mnist' cannot be read from {tmp_path} .*`download: true`") as raised:
        FashionMnist(FashionMnistOptions(root=tmp_path)).split("train")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif("KDKIT_DATA" not in os.environ, reason="KDKIT_DATA names no folder with the real files")
def test_the_real_files():
    source = FashionMnist(FashionMnistOptions(root=os.environ["KDKIT_DATA"]))
    info, train, test = source.info(), source.split("train"), source.split("test")
    assert (len(train), len(test)) == (info.num_train, info.num_test)
    assert train.labels.bincount().min() > 5000 and len(train.labels.unique()) == len(info.class_names) == info.num_classes
    assert test.images.shape == (10_000, *info.image_shape) and len(test.images.unique()) == 256
