"""What the author of a dataset implements: where images and texts come from, and in which form."""

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
from kdkit.errors import DataError


class Split(Protocol):
    """One part of a dataset, as a map-style dataset: item i is (PIL image, class index).

    It is read by several processes at once; an image that cannot be read raises, best a DataError
    that names its file.
    """

    @property
    def labels(self) -> Sequence[int]:
        """Class index of each item, known without reading the images."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@runtime_checkable
class Stream(Protocol):
    """One part of a dataset that can only be read from its start to its end, such as tar shards.

    What needs to know or to reach single images cannot be had with it: train_samples,
    train_fraction, validation, repeats (each raises a DataError), a teacher cache, losses that keep
    something per image. An interrupted epoch is taken up by reading it again up to that place.
    Which images come together depends on `data.workers`. Several processes can train on a
    `SharedStream` only.
    """

    def __len__(self) -> int:
        """Images of one epoch."""
        ...

    def read(self, seed: int | None, workers: int, batch_size: int) -> Iterable[tuple[Any, int]]:
        """(PIL image, class index) of one epoch; iterated in each worker process, it gives that
        worker's share.

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
        """What process `rank` of `world` reads. Its length stays that of the whole.

        Shuffled, it must have its part of an epoch's batches at least, by repetition if need be, so
        that no process waits for another's. In the order of the files, all processes together read
        every image once.
        """
        ...


@dataclass(frozen=True)
class DataInfo:
    """What is known of a dataset before it is read.

    Attributes:
        image_shape: (C, H, W); H and W are 0 where images have many sizes, so that a recipe must
            set `data.image_size`. Of texts, (N,): so many tokens at most.
        num_classes: K.
        num_train, num_test: lengths of the parts.
        class_names: K names, or none.
        further: names of the tensors that a text has beside its token ids and their mask; none for
            a single text.
        labelled: whether training images have labels; if not, `labels` of the training part are
            ignored, and only losses that read none can be used. Test images always have some.
        tokenizer: of texts, a digest of the words and their token ids; empty where it is not known.
        num_tokens: of texts, the number of different token ids; 0 where it is not known.
    """

    image_shape: Shape
    num_classes: int
    num_train: int
    num_test: int
    class_names: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    tokenizer: str = ""
    num_tokens: int = 0
    labelled: bool = True


@dataclass(frozen=True)
class Lacking:
    """Files that a dataset has not, and may fetch.

    Attributes:
        what: what they are, and from where they come.
        folder: where they go to (None: into the cache of the library that fetches them).
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
    Options: ClassVar[type[DatasetOptions]] = DatasetOptions
    split_at_check: ClassVar[bool] = True
    """Whether `kdkit check` calls `split`, to see that labels and lengths are sound. False where
    that takes long, or downloads.
    """

    def __init__(self, options: DatasetOptions) -> None:
        self.options = options

    def lacks(self) -> Lacking | None:
        """What `fetch` would bring; None where it is all there, or the options do not allow to
        fetch it. Connects to nothing.
        """
        return None

    def fetch(self) -> None:  # noqa: B027 -- most datasets are there
        """Bring what it lacks. Called before the rest in training, never by `kdkit check`; kdkit
        has said what comes from where.

        Raises:
            DataError: it cannot be fetched.
        """

    @abc.abstractmethod
    def info(self) -> DataInfo:
        """Shape and class count, without reading the images.

        Raises:
            DataError: its files are not there.
        """

    def own_files(self) -> Sequence[Path]:
        """Files, and folders of files, in which the user's own data lie, as far as they are
        there (default: none).

        A run's fingerprint covers them, so that changed data make another run. Fetches nothing.
        Files that a name stands for, such as MNIST's, are none of them.
        """
        return ()

    @abc.abstractmethod
    def split(self, part: Literal["train", "test"]) -> Split | InMemory | Texts | Stream:
        """One part: images in memory, a map-style dataset of PIL images, a stream of them, or
        texts.

        Raises:
            DataError: its files are missing or broken.
        """


@dataclass(frozen=True)
class InMemory:
    """A part of a dataset held as one tensor: images uint8 (N, C, H, W), labels int64 (N,)."""

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
    """A part of a dataset held as token ids; batches are mappings, padded to their longest text,
    with an `attention_mask`.

    Attributes:
        tokens: whole numbers of each text by the name under which networks take them, such as
            `input_ids`; of one text, all as many.
        labels: int64 (N,).
        padding: what short texts are filled up with, by the same names (default: 0).
    """

    tokens: Mapping[str, Sequence[Sequence[int]]]
    labels: Tensor
    padding: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        """Tokens of each text."""
        return [len(ids) for ids in next(iter(self.tokens.values()))]
