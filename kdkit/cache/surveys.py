"""Surveys of frozen teachers: made once over the training images, and kept on disk beside caches of
answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdkit.cache import fingerprint
from kdkit.cache.opening import DIRECTORY, called_in, directory, folder_name, wanted
from kdkit.cache.rows import Column
from kdkit.cache.store import MARKER, AnswerStore, read_about
from kdkit.contracts.dataset_source import Stream
from kdkit.contracts.missing_labels import NO_LABELS
from kdkit.contracts.records import Batch
from kdkit.contracts.survey import Survey
from kdkit.data.loaders import Data
from kdkit.errors import KdkitError, RunError, TapError
from kdkit.finite import LOOK
from kdkit.models.devices import device_of
from kdkit.models.surveyed import surveyed
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe

STREAM = (
    "shows the teacher all training images before the first step, and this dataset can only be read"
    " from start to end"
)
ROW = torch.zeros(1, dtype=torch.int64)  # a survey is a store of one row

T = TypeVar("T")


def found(
    recipe: Recipe, name: str | None, teacher: TappedModel, survey: Survey, data: Data
) -> dict[str, Tensor]:
    """Return what a survey finds in a frozen teacher's answers: read from disk, or made and kept.

    All processes of a launch must call it.

    Args:
        recipe: of the run.
        name: of the teacher in the recipe (None: a schedule made it).
        teacher: the model, on its device.
        survey: what is asked.
        data: of the run.

    Raises:
        TapError: the images have no places; the teacher has no such layer.
        RunError: what is found is not finite; the disk is nearly full; a file is damaged.
    """
    if data.still is None:
        raise TapError(f"{survey.name} {STREAM}")
    if teacher.elsewhere is not None:
        raise TapError(f"{survey.name} asks a network that is here; leave `at` out")
    part = data.still.read()
    assert not isinstance(part, Stream), "its images have places"
    images = data.still.indices if survey.images is None else survey.images.cpu()
    key = fingerprint.survey_key(recipe, name, teacher, survey, part, images)
    about = {
        "teacher": teacher.role if name is None else called_in(recipe, name),
        "data": recipe.spec.data.dataset.use,
        "views": 1,
        "images": len(images),
        "made": time.time(),
        "key": key,
    }
    kept = KeptSurvey(folder_of(recipe, name) / folder_name(survey.name, key), about)
    # the first process looks for all: its machine's disk may be its own
    if (known := _from_the_first(kept.read)) is not None:
        return known
    batches = data.still.ordered(part, images)
    shown = batches if data.info.labelled else _without_labels(batches)
    sums = _added_up(surveyed(survey, teacher, shown), device_of(teacher.module))
    for called, value in sums.items():
        if not bool(value.isfinite().all()):
            raise RunError(
                f"{teacher.role}: '{called}', which {survey.name} computes from its answers, is not"
                f" finite; {LOOK}"
            )
    return _from_the_first(lambda: kept.keep(sums))


def folder_of(recipe: Recipe, name: str | None) -> Path:
    """Return the folder of a teacher's surveys: that of its cache."""
    options = None if name is None else wanted(recipe, name)
    return recipe.spec.run.folder / DIRECTORY if options is None else directory(recipe, options)


@dataclass(frozen=True)
class KeptSurvey:
    """A survey on disk.

    Attributes:
        path: of its store; the name ends in a fingerprint of all that it depends on.
        about: plain values that `kdkit cache --list` shows.
    """

    path: Path
    about: dict[str, Any]

    def read(self) -> dict[str, Tensor] | None:
        """Return what is kept; None if it is not there, or damaged.

        Raises:
            DamagedFile: the store's description is damaged.
        """
        if not (self.path / MARKER).is_file():
            return None
        columns = [
            Column(one["name"], tuple(one["shape"]), one["dtype"])
            for one in read_about(self.path).get("columns", [])
        ]
        with self._opened(columns) as store:
            if not bool(store.whole(ROW).all()):
                return None
            return {name: value[0] for name, value in store.read(ROW).items()}

    def keep(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write it; return what is there now, as another process may have been faster.

        Raises:
            RunError: the disk is nearly full.
        """
        columns = [
            Column(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in values.items()
        ]
        with self._opened(columns) as store:
            store.write(ROW, {name: value[None] for name, value in values.items()})
            return {name: value[0] for name, value in store.read(ROW).items()}

    @contextlib.contextmanager
    def _opened(self, columns: list[Column]) -> Iterator[AnswerStore]:
        store = AnswerStore(self.path, columns, 1, self.about)
        try:
            yield store
        finally:
            store.close()


def _without_labels(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, labels=NO_LABELS)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _added_up(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Add up the tensors of all processes, each of which has seen its share of the images."""
    if not _several():
        return values
    totals = {name: value.to(device) for name, value in sorted(values.items())}
    for total in totals.values():
        dist.all_reduce(total)
    return {name: totals[name].cpu() for name in values}


def _from_the_first(make: Callable[[], T]) -> T:
    """Call a function in the first process; return its result, or raise its error, in all."""
    if not _several():
        return make()
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            said = [make()]
        except KdkitError as error:
            said = [RunError(str(error))]
    dist.broadcast_object_list(said)
    if isinstance(said[0], KdkitError):
        raise said[0]
    result: T = said[0]
    return result
