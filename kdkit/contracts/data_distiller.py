"""The interface of a distiller plugin: a few images that stand for a whole dataset."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from kdkit.contracts.options import COUNT, FolderPath, Options
from kdkit.contracts.schedule import Model
from kdkit.errors import DataError

SUFFIX = ".safetensors"


# a picture is written beside it, with another suffix
def _named(path: Path) -> Path:
    if path.suffix != SUFFIX:
        raise ValueError(f"the file is a safetensors file: its name ends in {SUFFIX}")
    return path


class DataDistillerOptions(Options):
    """Options of a distiller; subclass it as `Options` in the distiller."""

    images_per_class: int = Field(
        default=10, gt=0, le=COUNT, description="Number of images of each class."
    )
    file: Annotated[FolderPath, AfterValidator(_named)] | None = Field(
        default=None,
        description=(
            "The .safetensors file that is written (default: the run's name, in `run.folder`)."
        ),
    )

    def path(self, folder: Path, name: str) -> Path:
        """Return the path of the file of a recipe of that name."""
        return self.file or folder / f"{name}{SUFFIX}"


@dataclass(frozen=True)
class Material:
    """What a distiller works on. Images are uint8 (N, C, H, W), on the device.

    Attributes:
        images, labels: the training images that the recipe chooses, and their classes (N,).
        test_images, test_labels: to measure the result on, never to choose it.
        classes: K.
        student: builds a network of the recipe's student with random first weights, others at each
            call; its `features["penultimate"]` are what its classifier sees.
        teacher: returns the recipe's frozen teacher.
        tell: reports progress: finished steps, all steps, and a value in words.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    student: Callable[[], Model]
    teacher: Callable[[], Model]
    tell: Callable[[int, int, str], None]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def of_class(self, number: int) -> Tensor:
        """Return the places of a class's training images, ascending."""
        return (self.labels == number).nonzero()[:, 0]

    def drawn(self, count: int) -> Tensor:
        """Draw places of `count` images of each class, (K * count,), class by class; with
        repetition where a class has fewer.

        Raises:
            DataError: a class has none.
        """
        places = []
        for number in range(self.classes):
            own = self.of_class(number)
            if not len(own):
                raise DataError(f"class {number} has no training image")
            order = torch.randperm(len(own), device=own.device)
            places.append(own[order.repeat(-(-count // len(own)))[:count]])
        return torch.cat(places)


@dataclass(frozen=True)
class DistilledData:
    """The result of a distiller.

    Attributes:
        images: (M, C, H, W), uint8, or floating point in [0, 1], which is rounded to uint8.
        labels: classes (M,), or learnt labels (M, K) whose rows sum to 1; such a label may be
            negative or above 1 where a regression has made it.
        figures: what was measured, by name in words, such as the accuracy of a kernel regression.
    """

    images: Tensor
    labels: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class DataDistiller(abc.ABC):
    """Makes a few images of a dataset that networks are then trained on in its place."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    tasks: ClassVar[Set[str] | Literal["any"]] = frozenset({"classes of samples"})
    """Names of the supported tasks, or the meaning of their rows."""
    Options: ClassVar[type[DataDistillerOptions]] = DataDistillerOptions

    def __init__(self, options: DataDistillerOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def distill(self, material: Material) -> DistilledData:
        """Return the images and their labels. Draws from torch's global generators, which kdkit has
        seeded.

        Raises:
            DataError: it cannot be made of these data.
        """
