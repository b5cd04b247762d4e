"""Datasets through timm's `create_dataset`: Hugging Face, webdataset and TensorFlow datasets,
and torchvision's others.

Hugging Face's (hfds/) and torchvision's have their images in places, as kdkit's own datasets do.
The others are streams: see `kdkit.Stream` for what those cannot do. Webdataset's (wds/) can be read
by several processes, each with shards of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import kdkit

STREAMS = ("wds/", "tfds/", "hfids/")


class TimmOptions(kdkit.DatasetOptions):
    """What timm's `create_dataset` is told, and what it cannot tell."""

    dataset: str = Field(
        # tfds/OWNER:NAME would be fetched and run as Python
        pattern="^((hfds|hfids|wds|torch)/|tfds/[^:]*$)",
        description="timm's name: hfds/NAME, hfids/NAME, wds/, tfds/NAME, torch/NAME.",
    )
    root: kdkit.RecipePath | None = Field(
        default=None, description="Folder of the files (hfds, tfds: of the cache)."
    )
    train_split: str = Field(
        default="train",
        description="Name of the training part; wds: also `part-{0000..0009}.tar|10000`.",
    )
    test_split: str = Field(default="validation", description="Name of the test part.")
    class_map: kdkit.RecipePath | None = Field(
        default=None, description="Text file with a class name per line."
    )
    input_key: str | None = Field(
        default=None, description="Field of the image, where the format has fields."
    )
    target_key: str | None = Field(default=None, description="Field of the class, likewise.")
    num_classes: int | None = Field(
        default=None, gt=1, description="Classes, where timm does not know (wds)."
    )
    image_shape: tuple[int, int, int] = Field(
        default=(3, 0, 0), description="Channels, height, width; without it set `data.image_size`."
    )
    download: bool = Field(
        default=False, description="Fetch the files if they are not there (tfds, torch)."
    )


class Indexed:
    """A dataset with images in places; read through timm's reader, as timm's dataset puts the
    next image in a broken one's place.

    Args:
        items: item i is (open file or PIL image, class index).
        labels: class index of each.
    """

    def __init__(self, items: Any, labels: Iterable[int]) -> None:
        self.items = items
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = self.items[index][0]
        if isinstance(image, Image.Image):
            return image, self.labels[index]
        with image, Image.open(image) as opened:
            # decoded before the file is closed
            return opened.convert(opened.mode), self.labels[index]


class Streamed:
    """A dataset of timm's that is read from start to end. Images that timm cannot decode are
    left out, with a log line.
    """

    def __init__(self, source: Timm, part: str) -> None:
        self.source, self.part = source, part
        self.length = len(source.opened[part])
        if not self.length:
            raise kdkit.DataError(
                f"timm dataset '{source.options.dataset}': how many images has its {part} part?"
                " wds: `{0..9}.tar|10000`"
            )

    def __len__(self) -> int:
        return self.length

    def read(self, seed: int | None, workers: int, batch_size: int) -> Iterable[tuple[Any, int]]:
        # a reader of its own for each epoch, so that its order follows from the seed
        dataset: Any = self.source.create(
            self.part, is_training=seed is not None, seed=seed or 0, batch_size=batch_size
        )
        self.choose(dataset.reader, seed is not None)
        dataset.set_loader_cfg(workers)
        samples: Iterable[tuple[Any, int]] = dataset
        return samples

    def choose(self, reader: Any, training: bool) -> None:
        """Tell timm's reader which part of the files it reads: all of them."""


class Shards(Streamed):
    """Webdataset's, of which each training process reads other shards than the others.

    Args:
        source: the dataset.
        part: train or test.
        rank: of the process, below `world`.
        world: training processes.
    """

    def __init__(self, source: Timm, part: str, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        super().__init__(source, part)
        # timm's own length is that of a process
        self.length = source.opened[part].reader.num_samples

    def share(self, rank: int, world: int) -> Shards:
        return Shards(self.source, self.part, rank, world)

    def choose(self, reader: Any, training: bool) -> None:
        """timm shuffles the shards and deals them out in each epoch anew; where each image
        counts once, it would repeat and miss some.
        """
        reader.dist_rank, reader.dist_num_replicas = (self.rank, self.world) if training else (0, 1)
        if not training:
            info = reader.split_info
            reader.split_info = replace(info, filenames=info.filenames[self.rank :: self.world])


class Timm(kdkit.DatasetSource):
    """timm's datasets: Hugging Face (hfds/), webdataset (wds/), TensorFlow (tfds/), torchvision
    (torch/), folders, tar files.
    """

    name = "timm"
    split_at_check = False
    Options = TimmOptions
    options: TimmOptions

    def lacks(self) -> kdkit.Lacking | None:
        """Whatever timm finds missing: it alone knows."""
        o = self.options
        return (
            kdkit.Lacking(f"what is missing of {o.dataset} by timm", o.root) if o.download else None
        )

    def fetch(self) -> None:
        for part in ("train", "test"):
            self.create(part, download=True)

    def info(self) -> kdkit.DataInfo:
        train, test = len(self.split("train")), len(self.split("test"))
        return kdkit.DataInfo(
            self.options.image_shape,
            outputs=self._num_classes(),
            num_train=train,
            num_test=test,
        )

    def own_files(self) -> Sequence[Path]:
        """The folder of the shards; the other kinds are named, and their folders are caches."""
        return (
            [self.options.root]
            if self._kind == "wds" and self.options.root and self.options.root.is_dir()
            else []
        )

    def split(self, part: Literal["train", "test"]) -> kdkit.Split | kdkit.Stream:
        kind, dataset = self._kind, self.opened[part]
        if kind == "hfds":
            return Indexed(dataset.reader, dataset.reader.iter_targets())
        if kind == "torch":
            return Indexed(dataset, dataset.targets)
        return Shards(self, part) if kind == "wds" else Streamed(self, part)

    @cached_property
    def opened(self) -> dict[str, Any]:
        """timm's datasets of both parts."""
        return {"train": self.create("train"), "test": self.create("test")}

    def create(self, part: str, **settings: Any) -> Any:
        """timm's own dataset of one part.

        Raises:
            DataError: with what timm said.
        """
        from timm.data.dataset_factory import create_dataset

        o = self.options
        # torchvision's constructors take none of these
        if self._kind != "torch":
            settings |= {
                "input_key": o.input_key,
                "target_key": o.target_key,
                "class_map": str(o.class_map) if o.class_map else None,
            }
        try:
            root, split = (
                str(o.root) if o.root else None,
                (o.train_split if part == "train" else o.test_split),
            )
            if self._kind in ("hfds", "hfids"):
                # no Python that comes with a dataset runs
                settings["trust_remote_code"] = False
            return create_dataset(o.dataset, root=root, split=split, **settings)
        except Exception as error:  # each of the libraries behind it has errors of its own
            reason = kdkit.cause(error)
            raise kdkit.DataError(
                f"timm dataset '{o.dataset}', split '{split}', root {o.root}: {reason}"
            ) from error

    @property
    def _kind(self) -> str:
        return self.options.dataset.partition("/")[0]

    def _num_classes(self) -> int:
        if self.options.num_classes:
            return self.options.num_classes
        dataset = self.opened["train"]
        classes = dataset.classes if self._kind == "torch" else dataset.reader.class_to_idx
        if not classes:
            raise kdkit.DataError(
                f"timm dataset '{self.options.dataset}': its classes are not known; set num_classes"
                " or class_map"
            )
        return len(classes)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Timm]
