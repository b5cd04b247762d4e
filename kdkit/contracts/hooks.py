"""The questions kdkit asks a plugin. Each returns classes and does nothing else."""

from collections.abc import Sequence

import pluggy

from kdkit.contracts.balance import Balance
from kdkit.contracts.compression import Compression
from kdkit.contracts.data_distiller import DataDistiller
from kdkit.contracts.dataset_source import DatasetSource
from kdkit.contracts.loss import Loss
from kdkit.contracts.metric_source import MetricSource
from kdkit.contracts.model_source import ModelSource
from kdkit.contracts.schedule import Schedule
from kdkit.contracts.task import Task

# bodies are empty, as pluggy reads a specification and never calls it
hookspec = pluggy.HookspecMarker("kdkit")
hookimpl = pluggy.HookimplMarker("kdkit")


@hookspec
def kdkit_losses() -> Sequence[type[Loss]]:  # type: ignore[empty-body]
    """Return the Loss classes this plugin adds."""


@hookspec
def kdkit_schedules() -> Sequence[type[Schedule]]:  # type: ignore[empty-body]
    """Return the Schedule classes this plugin adds."""


@hookspec
def kdkit_models() -> Sequence[type[ModelSource]]:  # type: ignore[empty-body]
    """Return the ModelSource classes this plugin adds."""


@hookspec
def kdkit_datasets() -> Sequence[type[DatasetSource]]:  # type: ignore[empty-body]
    """Return the DatasetSource classes this plugin adds."""


@hookspec
def kdkit_tasks() -> Sequence[type[Task]]:  # type: ignore[empty-body]
    """Return the Task classes this plugin adds."""


@hookspec
def kdkit_metrics() -> Sequence[type[MetricSource]]:  # type: ignore[empty-body]
    """Return the MetricSource classes this plugin adds."""


@hookspec
def kdkit_balances() -> Sequence[type[Balance]]:  # type: ignore[empty-body]
    """Return the Balance classes this plugin adds."""


@hookspec
def kdkit_compressions() -> Sequence[type[Compression]]:  # type: ignore[empty-body]
    """Return the Compression classes this plugin adds."""


@hookspec
def kdkit_distillers() -> Sequence[type[DataDistiller]]:  # type: ignore[empty-body]
    """Return the DataDistiller classes this plugin adds."""
