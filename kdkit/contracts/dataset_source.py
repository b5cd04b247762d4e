"""The interface of a dataset plugin: where samples come from, and in which form."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdkit.contracts.inputs import Shape
from kdkit.contracts.options import Options
from kdkit.contracts.synonyms import with_synonyms
from kdkit.errors import DataError


class Pairs(Protocol):
    """One part of a dataset, as a map-style dataset: item i is (PIL image, target).

    Several processes read it at once. An image that cannot be read raises an exception, preferably
    a DataError that names its file. It is enough for a task whose targets move with the image, such
    as masks; other tasks need a `Split`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class Split(Pairs, Protocol):
    """A map-style dataset whose targets are known without reading the images."""

    @property
    def labels(self) -> Sequence[Any]:
        """Target of each item, such as a class index."""
        ...


# checkable: `split` may return an object of any class
@runtime_checkable
class Stream(Protocol):
    """One part of a dataset that can only be read from its start to its end, such as tar shards.

    Whatever needs random access, or the list of all images, is unavailable: train_samples,
    train_fraction, validation, repeats (each raises a DataError), a teacher cache, losses that keep
    something per image. An interrupted epoch is resumed by reading it again up to the place where
    it stopped. Which images share a batch depends on `data.workers`. Several processes can train on
    a `SharedStream` only.
    """

    def __len__(self) -> int:
        """Number of images in one epoch."""
        ...

    def read(self, seed: int | None, workers: int, batch_size: int) -> Iterable[tuple[Any, Any]]:
        """Return the (PIL image, target) pairs of an epoch; in a worker process, its share.

        Args:
            seed: of this epoch's order; None: in the order of the files, every image once.
            workers: processes that read, 0 for the calling one alone.
            batch_size: images per batch, so that shares of a shuffled epoch can be made whole
                batches (by repetition).
        """
        ...


@runtime_checkable
class SharedStream(Stream, Protocol):
    """A stream that several training processes can read, each its own share."""

    def share(self, rank: int, world: int) -> Stream:
        """Return the share that process `rank` of `world` reads; its length is the stream's.

        When shuffled, it must yield at least its part of an epoch's batches, repeating images if
        necessary, so that no process waits for another. In the order of the files, all processes
        together read every image once.
        """
        ...


@with_synonyms
@dataclass(frozen=True)
class DataInfo:
    """Properties of a dataset that are known before it is read.

    Attributes:
        image_shape: (C, H, W); H and W are 0 where images have many sizes, so that a recipe must
            set `data.image_size`. For texts, (N,): at most N tokens.
        outputs: K, how many values an answer has in each row: classes (`num_classes` is another
            name for it), labels or numbers, depending on the task.
        num_train, num_test: lengths of the parts.
        class_names: K names, or none.
        further: names of the tensors that a text has beside its token ids and their mask; none for
            a single text.
        labelled: whether training images have labels; if not, `labels` of the training part are
            ignored, and only losses that read none can be used.
        test_labelled: whether test images have labels; without, only a task that measures without
            can be asked.
        unlabelled: number of further training images without labels, if a recipe adds some
            (`data.unlabelled`).
        crop: (H, W) of training images, if a recipe crops them to another size than they are
            measured in.
        tokenizer: of texts, a digest of the words and their token ids; empty where it is not known.
        num_tokens: of texts, the number of different token ids; 0 where it is not known.
        fields: where an image holds several modalities, stacked as channels, the number of channels
            of each by its name, in their order.
    """

    image_shape: Shape
    outputs: int
    num_train: int
    num_test: int
    class_names: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    tokenizer: str = ""
    num_tokens: int = 0
    labelled: bool = True
    test_labelled: bool = True
    unlabelled: int = 0
    crop: tuple[int, int] | None = None
    fields: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def train_shape(self) -> Shape:
        """Shape of a training sample."""
        return (self.image_shape[0], *self.crop) if self.crop else self.image_shape


@dataclass(frozen=True)
class Lacking:
    """Files that a dataset does not have yet, and can fetch.

    Attributes:
        what: the files and their origin, in words.
        folder: their destination (None: the cache of the library that fetches them).
    """

    what: str
    folder: Path | None

    def __str__(self) -> str:
        return f"{self.what} to {self.folder}" if self.folder else self.what


class DatasetOptions(Options):
    """Options of a dataset; subclass it as `Options` in the dataset source."""


class DatasetSource(abc.ABC):
    """Reads one dataset."""

    name: ClassVar[str]
    task: ClassVar[str] = "classification"
    """The task that its targets are made for; a recipe's `task:` may name another one."""
    Options: ClassVar[type[DatasetOptions]] = DatasetOptions
    split_at_check: ClassVar[bool] = True
    """Let `kdkit check` verify labels and lengths by `split`; False if that is slow or fetches."""

    def __init__(self, options: DatasetOptions) -> None:
        self.options = options

    @classmethod
    def for_task(cls, options: Any) -> str:
        """Return the task that the targets under these options are made for: `task`, by default."""
        return cls.task

    def lacks(self) -> Lacking | None:
        """Describe what `fetch` would load, without a connection; None: nothing, or not allowed."""
        return None

    def fetch(self) -> None:  # noqa: B027 -- most datasets need no download
        """Fetch the missing files: called first in training, after an announcement, by no check.

        Raises:
            DataError: it cannot be fetched.
        """

    @abc.abstractmethod
    def info(self) -> DataInfo:
        """Return the shape of the samples and the number of outputs, without reading the images.

        Raises:
            DataError: its files do not exist.
        """

    def own_files(self) -> Sequence[Path]:
        """List existing files and folders that hold the user's own data (default: none).

        A run's fingerprint covers them, so that changed data give a different run. Fetches nothing.
        Files that a name identifies, such as MNIST's, are not listed.
        """
        return ()

    def notes(self) -> Sequence[str]:
        """Say what is odd about the data, such as boxes that are left out (default: nothing).

        `kdkit check` shows each as a line. It may read the headers of all images; called only where
        nothing is missing (`lacks`).

        Raises:
            DataError: its files are missing or broken.
        """
        return ()

    @abc.abstractmethod
    def split(self, part: Literal["train", "test"]) -> Pairs | InMemory | Texts | Stream:
        """Return one part: images in memory, a map-style dataset, a stream, or texts.

        Raises:
            DataError: its files are missing or broken.
        """


@dataclass(frozen=True)
class InMemory:
    """A part of a dataset in memory: images uint8 (N, C, H, W), targets (N, ...), classes int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if (
            self.images.dtype != torch.uint8
            or self.images.ndim != 4
            or len(self.images) != len(self.labels)
        ):
            raise DataError(
                f"InMemory takes uint8 images (N, C, H, W) and N labels, got {self.images.dtype}"
                f" {tuple(self.images.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Texts:
    """A part of a dataset as token ids; batches are padded mappings with an `attention_mask`.

    Attributes:
        tokens: integers of each text by the name of the network's argument, such as `input_ids`;
            for one text, all have the same length.
        labels: (N, ...), as in `InMemory`.
        padding: the values that pad short texts, by the same names (default: 0).
    """

    tokens: Mapping[str, Sequence[Sequence[int]]]
    labels: Tensor
    padding: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # at least one token each: a mean over the tokens of an empty text is undefined
        counts = {tuple(map(len, ids)) for ids in self.tokens.values()}
        if len(counts) != 1 or len(self.lengths) != len(self.labels) or not all(self.lengths):
            raise DataError(
                "Texts takes as many labels as texts, and of each text at least one token, as many"
                " under every name"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(ids) for ids in next(iter(self.tokens.values()))]
