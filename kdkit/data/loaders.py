"""The batches of a run: which images, in which order, with which augmentation.

All of it follows from the recipe, the seed and the number of the epoch, so any batch of any epoch
can be reproduced, with any number of processes and workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Pairs, Stream, Texts
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Arrange
from kdkit.contracts.task import Task
from kdkit.data import beside, streams
from kdkit.data.images import Finish, HeldImages, Images, Pictures, ReadImages
from kdkit.data.indexed import OrderedLoader, ShuffledLoader
from kdkit.data.labels import Part, as_values, described, labels_of, split
from kdkit.data.noise import NoiseLoader
from kdkit.data.sizes import as_batched, measured_batch_size, unshared
from kdkit.data.subsets import choose
from kdkit.data.texts import HeldTexts
from kdkit.data.together import Together
from kdkit.data.transforms import Transform, for_measuring, for_training, resized
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec


class TrainLoader(Protocol):
    """Training batches by epoch number.

    `Batch.index` is a sample's place in the dataset's whole training part: the same for the same
    image whatever `train_samples` and `validation` leave out, so a cache may be keyed on it. It can
    be larger than `num_samples`.

    Attributes:
        labels: targets of the chosen images, (N, ...); empty if they are read with the images, as
            masks and those of a stream are.
        indices: their places in the whole training part, (N,), ascending; empty for a stream.
        num_samples: N.
        indexed: whether `Batch.index` names the same image in every epoch (False for a stream).
    """

    labels: Tensor
    indices: Tensor
    num_samples: int
    indexed: bool

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        ...

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        """Return this process's share of an epoch's batches, from batch `start` on.

        Args:
            number: of the epoch; it determines the order.
            start: batches to skip.
            view: number of the augmentation, `number` by default; with a cache of few views,
                smaller numbers are used repeatedly.
            arrange: changes the order.

        Raises:
            DataError: a stream, or images that come repeatedly, cannot be arranged.
        """
        ...


class EvalLoader(Protocol):
    """Batches without augmentation, this process's share of them: every `world`-th image, in order.

    Attributes:
        num_samples: images over all processes together.
    """

    num_samples: int

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def whole(self) -> EvalLoader:
        """Return a loader of all images in this process."""
        ...


@dataclass(frozen=True)
class StillImages:
    """The images that are trained on with labels, without augmentation, read only when they are
    asked for.

    Attributes:
        indices: their places in the whole training part, (N,), ascending.
        read: reads that part.
        ordered: makes a loader of some places in a part.
    """

    indices: Tensor
    read: Callable[[], Part]
    ordered: Callable[[Part, Tensor], EvalLoader]


@dataclass(frozen=True)
class Data:
    """The data that a run trains and measures on; `info.image_shape` is that of the batches.

    `still`: None for a stream, whose images have no places.
    """

    info: DataInfo
    train: TrainLoader
    validation: EvalLoader | None
    test: EvalLoader
    still: StillImages | None = None


def prepare(
    spec: DataSpec,
    source: DatasetSource,
    task: Task,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    unlabelled: DatasetSource | None = None,
) -> Data:
    """Read the dataset and set up its loaders.

    Args:
        spec: the recipe's `data` section; which images are chosen follows from `spec.seed`.
        source: the dataset plugin.
        task: the task of the recipe.
        seed: of the order and the augmentation.
        device: device of the batches; images held in memory are sent there once.
        rank: this process's number, below `world`.
        world: training processes; each gets an equal share of every batch.
        unlabelled: the dataset plugin of `data.unlabelled`, if it names one.

    Raises:
        DataError: files are missing, or the recipe asks for what the dataset cannot give.
    """
    info = as_batched(spec, task, described(source, task))
    info = beside.described(spec, info, unlabelled, task)
    # equal shares, so that the mean of the processes' gradients is that of the batch
    if problem := unshared(spec, world):
        raise DataError("data.{}: {}".format(*problem))
    build = _Builder(spec, task, info, seed, device, rank, world)
    other = None if unlabelled is None else split(unlabelled, "train", unlabelled.info())
    read = functools.partial(split, source, "train", info)
    train: TrainLoader
    if spec.synthetic_batches is not None:
        train, validation, chosen = NoiseLoader(spec, info.image_shape, seed, device), None, None
    else:
        train, validation, chosen = build.train(read(), other)
    test = build.test(split(source, "test", info))
    still = None if chosen is None else StillImages(chosen, read, build.still)
    return Data(build.info, train, validation, test, still)


@dataclass(frozen=True)
class _Builder:
    spec: DataSpec
    task: Task
    info: DataInfo
    seed: int
    device: torch.device
    rank: int
    world: int

    def train(
        self, part: Part, other: Part | None = None
    ) -> tuple[TrainLoader, EvalLoader | None, Tensor | None]:
        """Make the loaders of training and validation images; also return the places of those that
        are trained on with labels, None for a stream.
        """
        finish = Finish(self.spec.augment, self.seed, self.device)
        if isinstance(part, Stream):
            streams.refuse(self.spec, part, self.world)
            self._refuse_large_batch(len(part))
            transform = self._transform(training=True)
            reader = self._reader(part, self.spec.batch_size // self.world, finish, transform)
            return streams.StreamTrainLoader(reader, self.seed, self.spec.drop_last), None, None
        labels = self._labels(part, "training")
        known = labels is not None and self.info.labelled
        groups = self.task.strata(labels) if labels is not None and known else None
        # without groups, all images are one: subsets are then drawn at random
        if groups is None:
            groups = torch.zeros(len(part), dtype=torch.int64)
        chosen, aside = choose(self.spec, groups)
        self._refuse_large_batch(len(chosen))
        validation = self._ordered(part, labels, aside) if len(aside) else None
        if self.spec.unlabelled is not None:
            whole = beside.join(self.spec, self.task, part, other, labels, chosen, aside)
            images = self._images(whole.part, whole.labels, whole.indices, finish, training=True)
            labelled = self._shuffled(beside.Some(images, whole.own))
            size = self.spec.batch_size - self.spec.labelled_size
            sizes = (size, self.seed, self.rank, self.world)
            return beside.BesideLoader(labelled, images, whole, *sizes), validation, chosen
        images = self._images(part, labels, chosen, finish, training=True)
        return self._shuffled(images), validation, chosen

    def still(self, part: Part, indices: Tensor) -> EvalLoader:
        """Make a loader of some training images without augmentation."""
        assert not isinstance(part, Stream), "its images have no places"
        return self._ordered(part, self._labels(part, "training"), indices)

    def _shuffled(self, images: Images) -> ShuffledLoader:
        return ShuffledLoader(images, self.task, self.spec, self.seed, self.rank, self.world)

    def test(self, part: Part) -> EvalLoader:
        if isinstance(part, Stream):
            streams.refuse_processes(part, self.world)
            transform = self._transform(training=False)
            reader = self._reader(
                part, measured_batch_size(self.spec, self.task), self._plain, transform
            )
            return streams.StreamEvalLoader(reader)
        return self._ordered(part, self._labels(part, "test"), torch.arange(len(part)))

    @property
    def _plain(self) -> Finish:
        return Finish(None, self.seed, self.device)

    def _transform(self, *, training: bool) -> Transform:
        spec, info = self.spec, self.info
        if self.task.moves:
            augment = (spec.joint_augment or None) if training else None
            return Together(spec, self.task, info, self.seed, augment)
        shape = info.image_shape
        return for_training(spec, shape, self.seed) if training else for_measuring(spec, shape)

    def _reader(
        self, part: Stream, batch_size: int, finish: Finish, transform: Transform
    ) -> streams.StreamReader:
        targets = functools.partial(self._targets, name="stream")
        workers = self.spec.workers
        return streams.StreamReader(
            part, batch_size, workers, finish, transform, targets, self.rank, self.world
        )

    def _ordered(
        self, part: Pairs | InMemory | Texts, labels: Tensor | None, indices: Tensor
    ) -> EvalLoader:
        images = self._images(part, labels, indices, self._plain, training=False)
        return OrderedLoader(
            images, measured_batch_size(self.spec, self.task), self.rank, self.world
        )

    def _images(
        self,
        part: Pairs | InMemory | Texts,
        labels: Tensor | None,
        indices: Tensor,
        finish: Finish,
        training: bool,
    ) -> Images:
        if isinstance(part, Texts):
            assert labels is not None, "no text has targets that move with it"
            return HeldTexts(part, labels, indices, self.device)
        one_by_one = labels is None or (training and self.spec.timm_augment)
        if isinstance(part, InMemory) and labels is not None and not one_by_one:
            # not indexed if all are chosen, as that copies them
            pixels = part.images if len(indices) == len(part) else part.images[indices]
            pixels = resized(pixels, self.spec.size, self.spec.interpolation)
            self._refuse_other_pixels(pixels)
            return HeldImages(pixels, labels[indices], indices, finish)
        files = Pictures(part) if isinstance(part, InMemory) else part
        transform, workers = self._transform(training=training), self.spec.workers
        # workers of measurements would be idle, and take memory, during the training between
        return ReadImages(files, labels, indices, finish, transform, workers, keep_workers=training)

    def _labels(self, part: Pairs | InMemory | Texts, name: str) -> Tensor | None:
        """Return the targets of a part; None if they are read with the images."""
        if not len(part):
            raise DataError(f"dataset '{self.spec.dataset.use}' has no {name} images")
        if self.task.moves:
            return None
        # -1 is no class, so that a loss cannot learn from it by mistake
        if name == "training" and not self.info.labelled:
            return torch.full((len(part),), -1)
        return self._targets(labels_of(part, self.task, self._whose(name)), name)

    def _targets(self, values: Any, name: str) -> Tensor:
        return self.task.targets(as_values(values), self.info, self._whose(name))

    def _whose(self, name: str) -> str:
        return f"dataset '{self.spec.dataset.use}': {name} labels"

    def _refuse_large_batch(self, count: int) -> None:
        if (size := self.spec.labelled_size) > count:
            raise DataError(f"data.batch_size: {size} is more than the {count} training images")

    def _refuse_other_pixels(self, pixels: Tensor) -> None:
        # images in [0, 1] that were cast to uint8 would train without an error, almost black
        if int(pixels.amax()) == 1:
            raise DataError(
                f"dataset '{self.spec.dataset.use}': no pixel is above 1, but they are taken as 0"
                " to 255; multiply by 255"
            )
        if tuple(pixels.shape[1:]) != self.info.image_shape:
            announced = " x ".join(map(str, self.info.image_shape))
            actual = " x ".join(map(str, pixels.shape[1:]))
            raise DataError(
                f"dataset '{self.spec.dataset.use}' says that its images are {announced}, but they"
                f" are {actual}"
            )
