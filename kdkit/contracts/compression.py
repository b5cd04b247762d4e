"""The interface of a compression plugin: what is done to a student's network before it learns, and
before it is deployed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kdkit.contracts.options import Options

Samples = Callable[[int], Iterable[Tensor]]
"""Gives that number of batches of training images, as the network takes them."""


class CompressionOptions(Options):
    """Options of a compression; subclass it as `Options` in the compression."""


class Compression(abc.ABC):
    """Changes the network of a student; its name is the key in the section `student`.

    The structure of what both methods return (names, shapes and types of tensors) must follow from
    the options and the structure of the network, never from the values of weights or samples: a
    student is read back by both methods on random weights, before its file is loaded.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 0
    """Of several compressions of one student, a lower one goes first: 0 changes the layers, 1 the
    arithmetic."""
    on_cpu_only: ClassVar[bool] = False
    """True if what it makes is trained and measured on the CPU only."""
    Options: ClassVar[type[CompressionOptions]] = CompressionOptions

    def __init__(self, options: CompressionOptions) -> None:
        self.options = options

    @classmethod
    def refused(cls, options: Any, train: Mapping[str, Any]) -> Mapping[str, str]:
        """Return what is wrong with the options for this `train` section: the key, empty for the
        whole section, and the reason.
        """
        return {}

    @abc.abstractmethod
    def begin(self, network: nn.Module, images: Tensor) -> nn.Module:
        """Return the network that learns, with modules and hooks at the paths of the given one.

        Args:
            network: with its first weights, those of `init` or a checkpoint included; it may be
                changed in place.
            images: random ones, as the network takes them.

        Raises:
            ModelError: this network cannot be compressed so; a library is missing.
        """

    def finish(self, network: nn.Module, samples: Samples) -> nn.Module:
        """Return the network that is measured, saved and exported, in eval mode; by default the one
        that has learnt.

        Args:
            network: what `begin` returned, trained so far; it goes on learning, so it must not be
                changed.
            samples: for ranges of activations.
        """
        return network

    @classmethod
    def finishes(cls) -> bool:
        """Check whether another network than the trained one is measured."""
        return cls.finish is not Compression.finish
