"""The folder of a run: the resolved recipe, versions, metrics as they come, checkpoints, the
student, the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdkit import files
from kdkit import recipe as recipes
from kdkit.contracts.dataset_source import DataInfo
from kdkit.errors import BusyError, DamagedFile, RunError
from kdkit.finite import with_nan
from kdkit.recipe import Recipe, consent
from kdkit.recipe.fairness import differences
from kdkit.recipe.yaml_source import Source
from kdkit.runs.checkpoints import Checkpoints
from kdkit.runs.file_shapes import LINE, RECIPE, Marker

LOCK = ".lock"
DATA_FILES = "data.files"  # in the content: no key of a recipe
AGAIN = "`kdkit train` with the same recipe makes it again"
ANEW = "`kdkit train` with the same recipe and `--restart` trains the run again"
VERSIONS = ("kdkit", "torch", "torchvision", "timm", "accelerate")


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        folder: the run folder.
        name, seed: the recipe's.
        test: metrics of the student (`kdkit.engine.evaluate.metrics`): after the last epoch, or of
            the mean of its best epochs' weights.
        validation: likewise on the validation split, if there is one.
        best: of the epoch with the best validation accuracy: `epoch`, `validation` and `test`
            metrics.
        averaged: the epochs over which `train.average_best` took the mean; none without it.
        last: what the student was worth after the last epoch, where it is such a mean: `validation`
            and `test` metrics.
        files: SHA-256 of each file of weights that the run leaves, and of its metrics.jsonl, by its
            path in the folder (none: of an older kdkit).
        teacher: the teacher's own metrics on the test data.
        peers: metrics of the other students on the test data.
        ensemble: of all students (and models in their company) together, on the test data.
        network: what the student's network is built from, where it is not the recipe's `student` (a
            peer that a schedule names).
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
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """Which weights were measured, in words."""
        return (
            f"mean of epochs {', '.join(map(str, self.averaged))}"
            if self.averaged
            else "last epoch"
        )

    @property
    def student(self) -> Path:
        """The student's weights, safetensors."""
        return self.folder / "student.safetensors"


class RunFolder:
    """Paths and files of one run.

    Attributes:
        digests: SHA-256 of the files of weights that were written or gone on with in this process,
            by path in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
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
            RunError: the folder belongs to another recipe (the message says in which keys) and is
                not to be begun anew; or it is no run folder.
        """
        if self.marker.is_file():
            if not restart and not self.is_untrained():
                self._refuse_other_recipe(recipe)
        elif self.path.exists() and (
            not self.path.is_dir() or any(not _leftover(path) for path in self.path.iterdir())
        ):
            raise RunError(
                f"{self.path} exists and is not a run folder; give the recipe another `name:` or"
                " `--run FOLDER`"
            )

    def _refuse_other_recipe(self, recipe: Recipe) -> None:
        theirs = self.about(ANEW)
        if not recipe.is_of(theirs["fingerprint"], theirs["content"]):
            changed = [key for key, *_ in differences(theirs["content"], recipe.content())]
            keys = (
                ", ".join("the data's files" if key == DATA_FILES else key for key in changed)
                or "kdkit's own defaults"
            )
            raise RunError(
                f"{self.path} holds a run of another recipe (different: {keys}); give this one"
                " another `name:` or `--run FOLDER`, or throw the old one away with `--restart`"
            )

    def is_untrained(self) -> bool:
        """Whether nothing has been trained here that could be lost: the run was refused, or
        failed, before its first epoch's end.
        """
        kept = (
            self.result_file,
            self.student_file,
            self.best_file,
            *self.checkpoints.folder.glob("*.pt"),
        )
        return not any(file.exists() for file in kept) and not self._epochs_are_logged()

    def _epochs_are_logged(self) -> bool:
        return self.metrics_file.is_file() and b'"kind": "epoch"' in self.metrics_file.read_bytes()

    @contextlib.contextmanager
    def claimed(self, recipe: Recipe, info: DataInfo, *, restart: bool = False) -> Iterator[None]:
        """Make the folder for this recipe, or find it made for the same one, and keep other
        processes from training in it.

        The lock ends with the process, however it ends.

        Raises:
            RunError: as `check`, or another process trains here.
        """
        self.check(recipe, restart=restart)
        with self._open_lock() as handle:
            # or a worker that outlives a killed process keeps its lock
            os.register_at_fork(after_in_child=handle.close)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BusyError(
                    f"{self.path}: another process is training in this folder"
                ) from None
            self.check(recipe, restart=restart)  # it may have been made in the meantime
            anew = restart or self.is_untrained()
            here = [path for path in self.path.iterdir() if path.name != LOCK]
            # the marker is never missing
            _remove([path for path in here if _leftover(path) or (anew and path != self.marker)])
            about = {
                "fingerprint": recipe.fingerprint,
                "content": recipe.content(),
                "data": asdict(info),
                "versions": versions(),
            }
            files.write_json(self.marker, about)
            files.write_sealed_text(self.recipe_file, recipe.dump(), recipe.fingerprint)
            yield

    def wait(self) -> None:
        """Wait until no process trains here any more."""
        with (self.path / LOCK).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)

    def _open_lock(self) -> Any:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / LOCK).open("w")
        except OSError as error:
            says = "the run is written there (`run.folder`, or `--run FOLDER`)"
            raise RunError(
                f"{self.path.absolute()}: cannot be written: {error.strerror}; {says}"
            ) from None

    def about(self, way_out: str = ANEW) -> Marker:
        """What run.json says.

        Raises:
            RunError: this is no run folder, or the file is damaged.
        """
        if not self.marker.is_file():
            raise RunError(f"{self.path}: no run folder (it has no run.json)")
        return files.read_json(self.marker, Marker, way_out)

    @property
    def owner(self) -> str | None:
        """The run's fingerprint, to which its other files belong (None: there is no run.json).

        Raises:
            RunError: run.json is damaged.
        """
        if not self.marker.is_file():
            return None
        about = self.marker.stat()
        return _fingerprint(self, about.st_ino, about.st_size, about.st_mtime_ns)

    def holds(self, recipe: Recipe) -> bool:
        """Whether a run of this very recipe is here."""
        if not self.marker.is_file():
            return False
        about = self.about()
        return recipe.is_of(about["fingerprint"], about["content"])

    def info(self) -> DataInfo:
        """Class count and image shape of the data that the run was made for, which may be gone.

        Raises:
            RunError: this is no run folder.
        """
        return self.about()["data"]

    def recipe(
        self, overrides: Mapping[str, Any] | None = None, plugins: Sequence[Path] = ()
    ) -> Recipe:
        """The resolved recipe.

        Args:
            overrides: values by `key.path`.
            plugins: the Python files and folders that may run; of those that the recipe names at
                another place, these take the place.

        Raises:
            RunError: this is no run folder.
            RecipeError: the recipe names other Python files.
        """
        self._refuse_damaged_recipe()
        source = Source(self.recipe_file, overrides)
        here = consent.moved(dict(_python_in(source.data)), plugins)
        source = source.changed({key: str(path) for key, path in here.items()})
        return recipes.read(source, files=False, allowed=tuple(plugins))

    def plain_recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values: no plugin of it needs to be there.

        Raises:
            RunError: this is no run folder, or the recipe is damaged.
        """
        self._refuse_damaged_recipe()
        return files.read_yaml(self.recipe_file, RECIPE, ANEW, self.owner)

    def _refuse_damaged_recipe(self) -> None:
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: no run folder (it has no recipe.yaml)")
        files.read_sealed_text(self.recipe_file, ANEW, self.owner)

    def result(self) -> Result | None:
        """The result, once the run is finished (and its student not taken away).

        Raises:
            RunError: it is damaged.
        """
        if not self.result_file.is_file() or not self.student_file.is_file():
            return None
        saved = with_nan(files.read_json(self.result_file, dict[str, Any], AGAIN, self.owner))
        saved.setdefault("cpu_seconds", 0.0)  # a run of an older kdkit, which did not count them
        return files.fitting(self.result_file, {**saved, "folder": self.path}, Result, AGAIN)

    def finished(
        self, recipe: Recipe, tell: Callable[[str], None] = lambda _: None
    ) -> Result | None:
        """The result of a run of this very recipe that is finished and whole; weights that were
        taken away are no damage.

        Where its student or its result are damaged, it counts as unfinished: training makes them
        again from the last checkpoint.

        Args:
            recipe: which.
            tell: told of such damage.

        Raises:
            RunError: other weights, which training does not make again, are damaged.
        """
        if not self.holds(recipe):
            return None
        try:
            result = self.result()
            for name in result.files if result else ():
                if name != self.metrics_file.name and (self.path / name).exists():
                    self.refuse_damaged(self.path / name)
        except DamagedFile as error:
            if error.path not in (self.result_file, self.student_file):
                raise
            tell(
                f"{error.path}: is damaged: {error.what}; it is made again from the run's last"
                " checkpoint"
            )
            return None
        return result

    def digest(self, file: Path) -> str | None:
        """The SHA-256 that a finished run has recorded of a file in its folder."""
        result = self.result()
        return result.files.get(str(file.relative_to(self.path))) if result else None

    def refuse_damaged(self, file: Path) -> None:
        """Make sure that a file is what the finished run has left.

        Raises:
            RunError: it is damaged, or another run's.
        """
        way_out = (
            AGAIN if file == self.student_file else f"{ANEW}, or delete the file to do without it"
        )
        files.refuse_other(file, self.digest(file), self.result_file, way_out)

    def keep(self, file: Path, content: bytes) -> None:
        """Write a file of weights, and take down its digest."""
        files.write_atomically(file, content)
        self.digests[str(file.relative_to(self.path))] = hashlib.sha256(content).hexdigest()

    def finish(self, result: Result) -> Result:
        """Write result.json, with the digests of all that is left; the result with them."""
        left = [
            self.student_file,
            self.best_file,
            self.metrics_file,
            *sorted(self.path.glob("snapshots/**/*.safetensors")),
        ]
        named = {str(file.relative_to(self.path)): file for file in left if file.is_file()}
        known = {
            name: self.digests.get(name) or files.file_digest(file) for name, file in named.items()
        }
        result = replace(result, files=known)
        saved = asdict(result)
        del saved["folder"]
        files.write_json(self.result_file, saved, self.owner or "")
        return result

    def snapshot_file(self, stage: str, epoch: int) -> Path:
        """The student's weights after an epoch of a stage."""
        return self.path / "snapshots" / stage / f"epoch-{epoch:04d}.safetensors"

    def best_epochs(self, stage: int) -> Path:
        """The folder of the weights that a stage's mean is taken of."""
        return self.path / "best-epochs" / f"stage{stage}"

    def snapshots(self) -> dict[int, Path]:
        """The snapshots of the last stage, the one that trained what the run leaves, by their
        epochs.
        """
        stage = next((line["stage"] for line in reversed(self.metrics("epoch"))), None)
        files = (
            sorted((self.path / "snapshots" / stage).glob("epoch-*.safetensors")) if stage else []
        )
        return {int(file.stem.removeprefix("epoch-")): file for file in files}

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        with files.naming(self.metrics_file), self.metrics_file.open("a") as stream:
            stream.write(files.log_line(line, self.owner or ""))

    def forget(self, stage: str, epochs: int, steps: int) -> list[str]:
        """Drop the rows of metrics.jsonl after a checkpoint: all after so many finished epochs
        and optimizer steps.

        Returns:
            What was lost, a sentence each: damaged lines, which are left out too, and epochs that
                are not there.
        """

        def stays(line: Mapping[str, Any]) -> bool:
            return bool(
                line["stage"] != stage
                or (line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= steps)
            )

        owner = self.owner
        lines = list(files.read_log(self.metrics_file, LINE, "it is left out", owner))
        kept = [line for line in lines if isinstance(line, dict) and stays(line)]
        files.write_atomically(
            self.metrics_file, "".join(files.log_line(line, owner or "") for line in kept).encode()
        )
        told = {
            line["epoch"] for line in kept if line["kind"] == "epoch" and line["stage"] == stage
        }
        lost = sorted(set(range(1, epochs + 1)) - told)
        gone = (
            [
                f"{self.metrics_file}: has nothing of epoch {', '.join(map(str, lost))} of stage"
                f" '{stage}' any more"
            ]
            if lost
            else []
        )
        return [*(str(line) for line in lines if isinstance(line, RunError)), *gone]

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind ("step" or "epoch").

        Raises:
            RunError: a line is damaged, or, of a finished run, the file is another.
        """
        way_out = "delete this line to do without it"
        if self.metrics_file.exists() and (result := self.result()):
            files.refuse_other(
                self.metrics_file, result.files.get(self.metrics_file.name), self.result_file, ANEW
            )
        return [line for line in self._lines(way_out) if line["kind"] == kind]

    def _lines(self, way_out: str) -> Iterator[dict[str, Any]]:
        for line in files.read_log(self.metrics_file, LINE, way_out, self.owner):
            if isinstance(line, RunError):
                raise line
            yield with_nan(line)


@functools.lru_cache(maxsize=1000)
def _fingerprint(folder: RunFolder, inode: int, size: int, modified: int) -> str:
    """That of a run.json, which is read again when it has changed."""
    return folder.about()["fingerprint"]


def _remove(paths: Sequence[Path]) -> None:
    """Remove what a run has left.

    Raises:
        RunError: one is a link to a folder; then all stay.
    """
    for path in paths:
        if path.is_symlink() and path.is_dir():
            raise RunError(
                f"{path}: is a link to a folder, and a new run would remove what is behind it;"
                " remove the link first"
            )
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _python_in(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """Every path in a resolved recipe that is a plugin's or a Python file's, by its key path."""
    if isinstance(value, str):
        if key.startswith("plugins.") or value.endswith(".py"):
            yield key, Path(value)
        return
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in items:
        yield from _python_in(item, f"{key}.{name}" if key else str(name))


def _leftover(path: Path) -> bool:
    """Whether a killed process may leave this in a folder before it is a run's."""
    return path.name == LOCK or (path.name.startswith(".") and path.suffix == ".part")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
