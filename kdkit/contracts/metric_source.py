"""The interface of a metric plugin: a torchmetrics object for the answers of a task."""

from __future__ import annotations

import abc
from collections.abc import Set
from typing import ClassVar, Literal

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.options import Options
from kdkit.contracts.task import Score, Task


class MetricOptions(Options):
    """Options of a metric; subclass it as `Options` in the metric source."""


class MetricSource(abc.ABC):
    """A user-defined number that is reported for every run: a recipe names it under `metrics:`."""

    name: ClassVar[str]
    tasks: ClassVar[Set[str] | Literal["any"]]
    """Names of the supported tasks, or the meaning of their rows: classes, labels, numbers."""
    Options: ClassVar[type[MetricOptions]] = MetricOptions

    def __init__(self, options: MetricOptions | None = None) -> None:
        self.options = options or self.Options()

    @abc.abstractmethod
    def score(self, task: Task, info: DataInfo) -> Score:
        """Return the score, whose `name` is that of the metric, or begins with it.

        Raises:
            DataError: it is not defined for these data.
        """
