"""A survey of a teacher: what a loss computes from its answers to all training images, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kdkit.contracts.records import Batch, Outputs
from kdkit.errors import PluginError

Answers = Iterable[tuple[Outputs, Batch]]
"""A teacher's answers to some of the training images, batch by batch, in the images' order."""

Reduce = Callable[..., Mapping[str, Tensor]]
"""A function of a plugin file: from `Answers`, and further arguments by name, to tensors by name.

With several processes each sees the answers to its share of the images, and the tensors are added
up: they must be sums, counts, or tables in which each image fills rows of its own.
"""


@dataclass(frozen=True)
class Survey:
    """The images and layers of a teacher that are looked at, and the function of the answers.

    Attributes:
        reduce: the function.
        layers: of the teacher, that the answers show beside the logits.
        images: their places in the dataset's whole training part, ascending (None: all that are
            trained on).
        arguments: of the function: tensors and plain values.
    """

    reduce: Reduce
    layers: tuple[str, ...] = ()
    images: Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # the result is kept under the function's name and the content of its file
        if not inspect.isfunction(self.reduce) or "<" in self.reduce.__qualname__:
            raise PluginError(
                f"{self.reduce} reduces a teacher's answers; it must be a function with a name, at"
                " the top of a file"
            )

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.reduce.__name__

    def of(self, answers: Answers) -> dict[str, Tensor]:
        """Return what the function makes of the answers, on the processor.

        Raises:
            PluginError: it gives no tensors by name.
        """
        found = self.reduce(answers, **self.arguments)
        if not isinstance(found, Mapping) or not found:
            raise PluginError(f"{self.name} gives {type(found).__name__}, not tensors by name")
        for name, value in found.items():
            if not isinstance(value, Tensor) or not value.numel():
                raise PluginError(f"{self.name} gives no tensor, or an empty one, for '{name}'")
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}
