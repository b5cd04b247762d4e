"""Rebuilds what a run has trained: its student, its teachers, the data it is measured on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired

import torch
from typing_extensions import TypedDict

from kdkit import files
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import Shape, TextShape
from kdkit.contracts.model_source import ModelOptions, ModelSource, RecipeTeacher
from kdkit.contracts.synonyms import renamed
from kdkit.data import loaders
from kdkit.engine.evaluate import Judge, measure, taught_answers
from kdkit.errors import ModelError, RecipeError, RunError
from kdkit.models.build import build_model
from kdkit.models.devices import is_channels_last
from kdkit.models.tapped import TappedModel
from kdkit.recipe import code_in, consent, fetching, registry
from kdkit.recipe.explain import validated
from kdkit.recipe.types import compressions_of, source_of, student_type
from kdkit.runs.deployment import deployed, deploying, rebuilt
from kdkit.runs.folder import ANEW, RunFolder
from kdkit.runs.networks import ModelFactory
from kdkit.runs.trained_teachers import TrainedTeacher, options_of

EXPORTED = "config.json"  # of an exported student; its `kdkit` key says how to build the network
WEIGHTS = "model.safetensors"
EXPORT_AGAIN = "`kdkit export` writes it again"


class Exported(TypedDict):
    """The entry that `kdkit export` writes about a network under the key `kdkit` of config.json."""

    options: dict[str, Any]
    needs_files: list[str]
    outputs: int
    image_shape: Shape
    fields: NotRequired[dict[str, int]]
    files: NotRequired[dict[str, str]]
    takes: NotRequired[str]
    class_names: NotRequired[list[str]]
    images: NotRequired[dict[str, Any]]


class LoadedRun:
    """A run folder that is read back. Nothing is trained, and nothing in the folder changes.

    Args:
        path: the run folder.
        overrides: values of the recipe's `data` section and its `metrics`, by key path.
        plugins: Python files and folders that may run, of those that the recipe names; no others
            do.

    Raises:
        RunError: no run folder, or an override of something other than data.
        RecipeError: something that the recipe names no longer exists; it names Python files that
            are not among `plugins`.
    """

    def __init__(
        self, path: Path, overrides: Mapping[str, Any] | None = None, plugins: Sequence[Path] = ()
    ) -> None:
        may = ("data.", "metrics")
        if foreign := [key for key in overrides or {} if not key.startswith(may)]:
            raise RecipeError(
                f"{foreign[0]}: the run is trained; only `data.` keys and `metrics` can be changed"
                " now"
            )
        self.folder = RunFolder(path)
        self.recipe, self._plugins = self.folder.recipe(overrides, plugins), plugins
        # the current caller decides about fetching, not the run
        self._fetch = (overrides or {}).get("data.dataset.download") is True

    @functools.cached_property
    def info(self) -> DataInfo:
        """Return what the student was trained for; the data themselves need not exist."""
        info = self.folder.info()
        return replace(info, image_shape=self.recipe.task.shape(info.image_shape))

    def seen_by(self, model: TappedModel) -> Shape:
        """Return the shape of what one of its networks sees of a sample: what its costs are of."""
        return model.sees or self.info.image_shape

    def network(self, *, best: bool = False) -> ModelOptions:
        """Return the options of the student's network: those of a peer if that was the best."""
        if (result := self.folder.result()) is None:
            return self.recipe.spec.student
        network = result.best.get("network") if best and result.best else result.network
        return options_of(self.recipe, network)

    def model_source(self, *, best: bool = False) -> ModelSource:
        """Return the source that builds the student's network."""
        return self.recipe.model_source(self.network(best=best))

    def student(
        self,
        *,
        best: bool = False,
        device: torch.device | None = None,
        channels_last: bool | None = None,
    ) -> TappedModel:
        """Rebuild the student as it was measured, in eval mode.

        Args:
            best: of the epoch with the best validation accuracy, not of the last.
            device: its device.
            channels_last: memory format (None: the recipe's).

        Raises:
            RunError: its weights do not exist (yet).
        """
        file = self._weights(best)
        if channels_last is None:
            train = self.recipe.spec.train
            channels_last = is_channels_last(train, device or torch.device("cpu"))
        # a student alone needs no teacher, whose run may be gone
        taught = self._taught_by() if deploying(self.recipe) else {}
        network = self.network(best=best)
        return rebuilt(
            self.recipe,
            self.info,
            taught,
            network,
            file,
            device=device,
            channels_last=channels_last,
        )

    def deployed(self, *, best: bool = False) -> TappedModel | None:
        """Build what the losses deploy for the student, with random weights; None: itself.

        Raises:
            RunError: it contains a part of a teacher whose run no longer exists.
        """
        if not deploying(self.recipe):
            return None
        return deployed(self.recipe, self.info, self._taught_by(), self.network(best=best))

    def teachers(
        self, *, device: torch.device | None = None, answering: bool = True
    ) -> list[TappedModel]:
        """Rebuild the teachers, frozen and whole; `answering`: those that have the data's classes.

        Raises:
            RunError: a run that trained one no longer exists.
        """
        if not self.recipe.spec.all_teachers():
            return []
        return ModelFactory(
            self.recipe, self.info, self._taught_by(), device=device or torch.device("cpu")
        ).whole_teachers(answering=answering)

    def teacher_runs(self) -> list[RunFolder]:
        """Return the runs of those teachers that other recipes train.

        Raises:
            RunError: one no longer exists.
        """
        teachers = self._taught_by().values()
        return [RunFolder(teacher.file.parent) for teacher in teachers if teacher.file]

    def data(self, *, device: torch.device | None = None) -> loaders.Data:
        """Open the data in one process; the override `data.dataset.download=true` fetches them."""
        spec, source = self.recipe.spec, self.recipe.dataset()
        if self._fetch:
            fetching.fetch(self.recipe, source, lambda text: print(text, file=sys.stderr))
        # to measure, the dataset of the unlabelled samples need not be there
        labelled = {"unlabelled": None, "batch_size": spec.data.labelled_size}
        return loaders.prepare(
            spec.data.model_copy(update=labelled),
            source,
            self.recipe.task,
            seed=spec.seed,
            device=device or torch.device("cpu"),
        )

    def _weights(self, best: bool) -> Path:
        folder, file = self.folder, self.folder.best_file if best else self.folder.student_file
        if file.is_file():
            folder.refuse_damaged(file)
            return file
        # the file is missing; say which of the reasons it is
        if best and not self.recipe.spec.data.validation:
            raise RunError(
                f"{folder.path}: has no best epoch, which only `data.validation` can tell; leave"
                " out --best"
            )
        if folder.digest(file):
            raise RunError(f"{folder.path}: there is no {file.name} any more; {ANEW}")
        done = len(folder.metrics("epoch"))
        raise RunError(
            f"{folder.path}: is not finished ({done} epochs so far), so there is no {file.name};"
            " `kdkit train` goes on with it"
        )

    def _taught_by(self) -> dict[str, TrainedTeacher]:
        """Find the teachers' runs by the fingerprints that this run recorded."""
        # not by the teachers' recipes, which may have been edited since
        content = self.folder.about()["content"]
        sections = [content["teacher"]] if content["teacher"] else content["teachers"]
        teachers = zip(self.recipe.spec.all_teachers().items(), sections, strict=True)
        return {
            name: self._run_of(teacher, saved["recipe"])
            for (name, teacher), saved in teachers
            if isinstance(teacher, RecipeTeacher)
        }

    def _run_of(self, teacher: RecipeTeacher, wanted: str) -> TrainedTeacher:
        # runs may have been moved together, away from the folder that the recipe names
        folders = dict.fromkeys(
            (self.folder.path.resolve().parent, self.recipe.spec.run.folder.resolve())
        )
        unreadable: list[str] = []
        for marker in (m for folder in folders for m in sorted(folder.glob("*/run.json"))):
            run = RunFolder(marker.parent)
            try:
                fingerprint = run.about()["fingerprint"]
            except RunError as error:  # the result may belong to another run
                unreadable.append(str(error))
                continue
            if fingerprint == wanted and run.student_file.is_file():
                return TrainedTeacher.of(run, run.recipe(plugins=self._plugins), run.result())
        looked = " or ".join(map(str, folders))
        says = (
            f"{self.folder.path}: the run that trained its teacher ({teacher.recipe}) is not in"
            f" {looked}; train it again first"
        )
        raise RunError(f"{says} ({unreadable[0]})" if unreadable else says)


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one part of the data, by name."""

    role: str
    part: str
    metrics: Mapping[str, float]


def evaluate(run: LoadedRun, *, best: bool = False, device: torch.device) -> Iterator[Scores]:
    """Measure a run's student and teacher again, on test data and the validation split."""
    teachers = run.teachers(device=device)
    student = run.student(best=best, device=device)
    prepared = run.data(device=device)
    judge = Judge.of(run.recipe, prepared.info)
    for split, batches in (("test", prepared.test), ("validation", prepared.validation)):
        if batches is None:
            continue
        known = taught_answers(teachers, batches, judge)
        yield Scores("student", split, measure(student, batches, judge, known))
        if known:
            who = "teacher" if len(teachers) == 1 else "teachers together"
            yield Scores(who, split, known.scores)


def load_student(
    folder: Path | str,
    *,
    best: bool = False,
    device: torch.device | str = "cpu",
    plugins: Sequence[Path | str] = (),
) -> TappedModel:
    """Load the student of a finished run or an export: call it with images in [0, 1].

    Its network is `.module`, in eval mode; its preprocessing of images is `.adapt`. A student that
    sees a part of each sample (`input`) takes whole samples, or that part, of shape `.sees`.

    Args:
        folder: a run folder or an exported one.
        best: of a run, the epoch with the best validation accuracy.
        device: its device.
        plugins: Python files or folders that may run: plugins that an exported network needs, and
            those that a run's recipe names.

    Raises:
        RunError: the folder is neither, or the run is not finished.
        RecipeError: the run's recipe names Python files that are not among `plugins`.
        ModelError: the network cannot be built, or the weights do not fit.
    """
    path, files = Path(folder), tuple(Path(p).expanduser().resolve() for p in plugins)
    if (path / "recipe.yaml").is_file():
        return LoadedRun(path, plugins=files).student(best=best, device=torch.device(device))
    if not (path / EXPORTED).is_file():
        raise RunError(
            f"{path}: neither a run folder (it has no recipe.yaml) nor an exported student (no"
            f" {EXPORTED})"
        )
    return _load_exported(path, torch.device(device), files)


def exported_about(folder: Path) -> Exported:
    """Read what `kdkit export` wrote about a network.

    Raises:
        RunError: the file is not kdkit's, or damaged.
    """
    record = folder / EXPORTED
    config = files.read_json(record, dict[str, Any], EXPORT_AGAIN)
    if "kdkit" not in config:
        raise RunError(f"{folder}: {EXPORTED} was not written by `kdkit export`")
    # the seal covers this entry only: the rest of the file is in the form of another library
    entry = files.unsealed(record, config["kdkit"], EXPORT_AGAIN)
    # an older kdkit wrote it under another name
    about: Exported = files.fitting(record, renamed(entry), Exported, EXPORT_AGAIN)
    return about


def _load_exported(folder: Path, device: torch.device, plugins: tuple[Path, ...]) -> TappedModel:
    record, about = folder / EXPORTED, exported_about(folder)
    digest = about.get("files", {}).get(WEIGHTS)
    files.refuse_other(folder / WEIGHTS, digest, record, EXPORT_AGAIN)
    if about["needs_files"]:
        needed = ", ".join(about["needs_files"])
        raise ModelError(
            f"{folder}: the network is made by {needed}, which kdkit does not run unasked; build it"
            f" there and load {WEIGHTS}"
        )
    known = registry.load(plugins)
    source, name = source_of(about["options"]["model"], known.models)
    kind = student_type(about["options"]["model"], known)
    options = validated(kind, about["options"], str(record), ModelError)
    consent.meet({path: str(record) for _, path in code_in(options)}, plugins)
    builder = known.models[source](options, name)
    # an older export does not say what its network takes
    takes, shape = about.get("takes", builder.takes), about["image_shape"]
    if takes == "texts":
        shape = TextShape(shape)
    outputs, weights = about["outputs"], folder / WEIGHTS
    model = build_model(
        options,
        builder,
        outputs,
        shape,
        role="student",
        file=weights,
        device=device,
        fields=about.get("fields"),
        compressions=compressions_of(options, known),
    )
    model.module.eval()
    return model
