"""The folder of a run: the resolved recipe, versions, metrics as they come, checkpoints, the student, the result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdkit import recipe as recipes
from kdkit.checkpoints import Checkpoints, write_atomically
from kdkit.dataset_source import DataInfo
from kdkit.errors import RunError
from kdkit.fairness import differences
from kdkit.finite import metrics_with_nan, to_json
from kdkit.recipe import Recipe

LOCK = ".lock"
VERSIONS = ("kdkit", "torch", "torchvision", "timm", "accelerate")


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        folder: the run folder.
        name, seed: the recipe's.
        test: metrics of the student (`kdkit.evaluate.metrics`): after the last epoch, or of the mean of its best epochs' weights.
        validation: likewise on the validation split, if there is one.
        best: of the epoch with the best validation accuracy: `epoch`, `validation` and `test` metrics.
        averaged: the epochs over which `train.average_best` took the mean; none without it.
        last: what the student was worth after the last epoch, where it is such a mean: `validation` and `test` metrics.
        teacher: the teacher's own metrics on the test data.
        peers: metrics of the other students on the test data.
        ensemble: of all students (and models in their company) together, on the test data.
        network: what the student's network is built from, where it is not the recipe's `student` (a peer that a schedule names).
        parameters: of the student.
        seconds: training time, measurements included.
        cpu_seconds: likewise, of this process on the processor (its loader workers aside).
    """

    folder: Path
    name: str
    seed: int
    test: Mapping[str, float]
    parameters: int
    seconds: float
    cpu_seconds: float
    epochs: int
    validation: Mapping[str, float] | None = None
    best: Mapping[str, Any] | None = None
    teacher: Mapping[str, float] | None = None
    peers: tuple[Mapping[str, float], ...] = ()
    ensemble: Mapping[str, float] | None = None
    network: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())
    averaged: tuple[int, ...] = ()
    last: Mapping[str, Mapping[str, float]] | None = None

    @property
    def moment(self) -> str:
        """Which weights were measured, in words."""
        return f"mean of epochs {', '.join(map(str, self.averaged))}" if self.averaged else "last epoch"

    @property
    def student(self) -> Path:
        """The student's weights, safetensors."""
        return self.folder / "student.safetensors"


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / "run.json"
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.student_file = path / "student.safetensors"
        self.best_file = path / "best.safetensors"
        self.checkpoints = Checkpoints(path / "checkpoints")

    def check(self, recipe: Recipe, *, restart: bool = False) -> None:
        """Make sure that this recipe may be carried out here; nothing is changed.

        Raises:
            RunError: the folder belongs to another recipe (the message says in which keys) and is not to be begun anew; or it is
                no run folder.
        """
        if self.marker.is_file():
            theirs = json.loads(self.marker.read_text())
            if not restart and theirs["fingerprint"] != recipe.fingerprint:
                keys = ", ".join(key for key, *_ in differences(theirs["content"], recipe.content())) or "kdkit's own defaults"
                raise RunError(
                    f"{self.path} holds a run of another recipe (different: {keys}); give this one another `name:` or `--run FOLDER`, "
                    "or throw the old one away with `--restart`"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(not _leftover(path) for path in self.path.iterdir())):
            raise RunError(f"{self.path} exists and is not a run folder; give the recipe another `name:` or `--run FOLDER`")

    @contextlib.contextmanager
    def claimed(self, recipe: Recipe, info: DataInfo, *, restart: bool = False) -> Iterator[None]:
        """Make the folder for this recipe, or find it made for the same one, and keep other processes from training in it.

        The lock ends with the process, however it ends.

        Raises:
            RunError: as `check`, or another process trains here.
        """
        self.check(recipe, restart=restart)
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as handle:
            os.register_at_fork(after_in_child=handle.close)  # or a worker that outlives a killed process keeps its lock
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path}: another process is training in this folder") from None
            self.check(recipe, restart=restart)  # it may have been made in the meantime
            for path in self.path.iterdir():
                if path.name != LOCK and (_leftover(path) or (restart and path != self.marker)):  # the marker is never missing
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            about = {"fingerprint": recipe.fingerprint, "content": recipe.content(), "data": asdict(info), "versions": versions()}
            write_atomically(self.marker, to_json(about, indent=1).encode())
            write_atomically(self.recipe_file, recipe.dump().encode())
            yield

    def holds(self, recipe: Recipe) -> bool:
        """Whether a run of this very recipe is here."""
        return self.marker.is_file() and bool(json.loads(self.marker.read_text())["fingerprint"] == recipe.fingerprint)

    def info(self) -> DataInfo:
        """Class count and image shape of the data that the run was made for, which may be gone.

        Raises:
            RunError: this is no run folder.
        """
        if not self.marker.is_file():
            raise RunError(f"{self.path}: no run folder (it has no run.json)")
        saved: dict[str, Any] = json.loads(self.marker.read_text())["data"]
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        return DataInfo(**plain)

    def recipe(self, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """The resolved recipe; `overrides` are values by `key.path`.

        Raises:
            RunError: this is no run folder.
        """
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: no run folder (it has no recipe.yaml)")
        return recipes.load(self.recipe_file, overrides, files=False)

    def result(self) -> Result | None:
        """The result, once the run is finished (and its student not taken away)."""
        if not self.result_file.is_file() or not self.student_file.is_file():
            return None
        saved = json.loads(self.result_file.read_text(), object_hook=metrics_with_nan)
        saved.setdefault("cpu_seconds", 0.0)  # a run of an older kdkit, which did not count them
        return Result(folder=self.path, **{**saved, **{key: tuple(saved.get(key, ())) for key in ("peers", "warnings", "averaged")}})

    def finish(self, result: Result) -> None:
        saved = asdict(result)
        del saved["folder"]
        write_atomically(self.result_file, (to_json(saved, indent=1) + "\n").encode())

    def snapshot_file(self, stage: str, epoch: int) -> Path:
        """The student's weights after an epoch of a stage."""
        return self.path / "snapshots" / stage / f"epoch-{epoch:04d}.safetensors"

    def best_epochs(self, stage: int) -> Path:
        """The folder of the weights that a stage's mean is taken of."""
        return self.path / "best-epochs" / f"stage{stage}"

    def snapshots(self) -> dict[int, Path]:
        """The snapshots of the last stage, the one that trained what the run leaves, by their epochs."""
        stage = next((line["stage"] for line in reversed(self.metrics("epoch"))), None)
        files = sorted((self.path / "snapshots" / stage).glob("epoch-*.safetensors")) if stage else []
        return {int(file.stem.removeprefix("epoch-")): file for file in files}

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics_file.open("a") as stream:
            stream.write(to_json(line) + "\n")

    def forget(self, stage: str, epochs: int, steps: int) -> None:
        """Leave out of metrics.jsonl what a stage will write again: all after so many finished epochs and optimizer steps."""

        def stays(line: Mapping[str, Any]) -> bool:
            return bool(line["stage"] != stage or (line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= steps))

        kept = filter(stays, self._lines())
        write_atomically(self.metrics_file, "".join(to_json(line) + "\n" for line in kept).encode())

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind ("step" or "epoch")."""
        return [line for line in self._lines() if line["kind"] == kind]

    def _lines(self) -> Iterator[dict[str, Any]]:
        text = self.metrics_file.read_text() if self.metrics_file.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the process was killed while it wrote this one
                yield json.loads(line, object_hook=metrics_with_nan)


def _leftover(path: Path) -> bool:
    """Whether a killed process may leave this in a folder before it is a run's."""
    return path.name == LOCK or (path.name.startswith(".") and path.suffix == ".part")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
