"""The folder of a run: the resolved recipe, versions, metrics, checkpoints, the student, the
result.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdkit import files
from kdkit import recipe as recipes
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.task import ScoreInfo
from kdkit.engine.scores import scores_of, usual_scores
from kdkit.errors import BusyError, DamagedFile, RunError
from kdkit.finite import with_nan
from kdkit.recipe import Recipe, consent
from kdkit.recipe.fairness import differences, written
from kdkit.recipe.yaml_source import Source
from kdkit.runs.checkpoints import Checkpoints
from kdkit.runs.leftovers import LOCK, is_leftover, python_in, remove
from kdkit.runs.result import LINE, RECIPE, Marker, Result, versions

DATA_FILES = "data.files"  # key in the content; no recipe has such a key
AGAIN = "`kdkit train` with the same recipe makes it again"
ANEW = "`kdkit train` with the same recipe and `--restart` trains the run again"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)


class RunFolder:
    """Paths and files of one run.

    Attributes:
        digests: SHA-256 of the files of weights that this process has written or resumed from, by
            path in the folder.
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
        """Check that this recipe may run here; nothing is changed.

        Raises:
            RunError: the folder belongs to another recipe (the message says in which keys) and is
                not to be restarted; or it is no run folder.
        """
        if self.marker.is_file():
            if not restart and not self.is_untrained():
                self._refuse_other_recipe(recipe)
        elif not self.is_free():
            raise RunError(
                f"{self.path} exists and is not a run folder; give the recipe another `name:` or"
                " `--run FOLDER`"
            )

    def _refuse_other_recipe(self, recipe: Recipe) -> None:
        theirs = self.about(ANEW)
        if not recipe.is_of(theirs["fingerprint"], theirs["content"]):
            changed = (key for key, *_ in differences(theirs["content"], recipe.content()))
            told = (
                "the data's files" if key == DATA_FILES else written(key, recipe) for key in changed
            )
            keys = ", ".join(told) or "kdkit's own defaults"
            raise RunError(
                f"{self.path} holds a run of another recipe (different: {keys}); give this one"
                " another `name:` or `--run FOLDER`, or throw the old one away with `--restart`"
            )

    def is_free(self) -> bool:
        """Check that nothing is here, but for what a process leaves that has only locked it."""
        return not self.path.exists() or (
            self.path.is_dir() and all(is_leftover(path) for path in self.path.iterdir())
        )

    def is_untrained(self) -> bool:
        """Check that no training here could be lost: the run was refused, or failed, before the end
        of its first epoch.
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
        """Make the folder for this recipe, or reuse it if it belongs to the same one, and lock it
        against other processes.

        The lock ends with the process, even if it crashes.

        Raises:
            RunError: as `check`, or another process trains here.
        """
        self.check(recipe, restart=restart)
        with self.held():
            # another process may have made it before the lock was taken
            self.check(recipe, restart=restart)
            anew = restart or self.is_untrained()
            here = [path for path in self.path.iterdir() if path.name != LOCK]
            # the marker is never missing
            remove([path for path in here if is_leftover(path) or (anew and path != self.marker)])
            about = {
                "fingerprint": recipe.fingerprint,
                "content": recipe.content(),
                "data": asdict(info),
                "versions": versions(),
                "task": recipe.task.name,
                "scores": [asdict(i) for one in scores_of(recipe, info) for i in one.infos()],
                "agreement": [asdict(i) for o in recipe.task.agreement(info) for i in o.infos()],
            }
            files.write_json(self.marker, about)
            files.write_sealed_text(self.recipe_file, recipe.dump(), recipe.fingerprint)
            yield

    def wait(self) -> None:
        """Wait until no process trains here."""
        with self._lock.acquire(poll_interval=1):
            pass

    def held(self) -> contextlib.AbstractContextManager[object]:
        """Lock the folder against other processes; this object may lock it again.

        Raises:
            BusyError: another process, or another object of this one, holds it.
            RunError: it cannot be made or locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return self._lock.acquire(blocking=False)
        except Timeout:
            raise BusyError(f"{self.path}: another process is training in this folder") from None
        except OSError as error:
            what = "locked" if error.errno in NO_LOCKS else "written"
            says = "the run is written there (`run.folder`, or `--run FOLDER`)"
            raise RunError(
                f"{self.path.absolute()}: cannot be {what}: {error.strerror}; {says}"
            ) from None

    @functools.cached_property
    def _lock(self) -> FileLock:
        # only the system's own lock: a lock file would outlive a killed process
        return FileLock(self.path / LOCK, fallback_to_soft=False)

    def about(self, way_out: str = ANEW) -> Marker:
        """Return the content of run.json.

        Raises:
            RunError: this is no run folder, or the file is damaged.
        """
        if not self.marker.is_file():
            raise RunError(f"{self.path}: no run folder (it has no run.json)")
        return files.read_json(self.marker, Marker, way_out)

    @property
    def owner(self) -> str | None:
        """Return the run's fingerprint, to which its other files belong (None: there is no
        run.json).

        Raises:
            RunError: run.json is damaged.
        """
        if not self.marker.is_file():
            return None
        about = self.marker.stat()
        return _fingerprint(self.path, about.st_ino, about.st_size, about.st_mtime_ns)

    def holds(self, recipe: Recipe) -> bool:
        """Check whether a run of exactly this recipe is here."""
        if not self.marker.is_file():
            return False
        about = self.about()
        return recipe.is_of(about["fingerprint"], about["content"])

    def info(self) -> DataInfo:
        """Return the class count and image shape of the data that the run was made for, even if the
        data no longer exist.

        Raises:
            RunError: this is no run folder.
        """
        return self.about()["data"]

    def scores(self) -> tuple[ScoreInfo, ...]:
        """Return the descriptions of its metrics in order: the deciding score first, agreement with
        a teacher last. For an older kdkit's run, names only.
        """
        if self.marker.is_file() and "scores" in (about := self.about()):
            return (*about["scores"], *about.get("agreement", ()))
        lines = self.metrics("epoch")
        measured: dict[str, float] = next((each["test"] for each in lines if "test" in each), {})
        known = usual_scores(self.info()) if self.marker.is_file() else {}
        return tuple(known.get(name) or ScoreInfo(name=name, title=name) for name in measured)

    def recipe(
        self, overrides: Mapping[str, Any] | None = None, plugins: Sequence[Path] = ()
    ) -> Recipe:
        """Load the resolved recipe.

        Args:
            overrides: values by `key.path`.
            plugins: the Python files and folders that may run; they replace files of the same name
                that the recipe has at another place.

        Raises:
            RunError: this is no run folder.
            RecipeError: the recipe names other Python files.
        """
        self._refuse_damaged_recipe()
        source = Source(self.recipe_file, overrides)
        here = consent.moved(dict(python_in(source.data)), plugins)
        source = source.changed({key: str(path) for key, path in here.items()})
        return recipes.read(source, files=False, allowed=tuple(plugins))

    def plain_recipe(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values: no plugin of it has to be installed.

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
        """Read the result if the run is finished and its student still exists.

        Raises:
            RunError: it is damaged.
        """
        if not self.result_file.is_file() or not self.student_file.is_file():
            return None
        saved = with_nan(files.read_json(self.result_file, dict[str, Any], AGAIN, self.owner))
        saved.setdefault("cpu_seconds", 0.0)  # older versions of kdkit did not record it
        return files.fitting(self.result_file, {**saved, "folder": self.path}, Result, AGAIN)

    def finished(
        self, recipe: Recipe, tell: Callable[[str], None] = lambda _: None
    ) -> Result | None:
        """Return the result of a run of exactly this recipe if it is finished and intact; deleted
        weights are no damage.

        If its student or its result is damaged, it counts as unfinished: training makes them again
        from the last checkpoint.

        Args:
            recipe: the recipe.
            tell: called with a message about such damage.

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
        if result is not None and recipe.spec.metrics:
            told = [score.name for score in scores_of(recipe, self._seen_info(recipe))]
            if missing := [name for name in told if name not in result.test]:
                tell(
                    f"{self.path}: was trained without {', '.join(missing)}; `kdkit evaluate` with"
                    f" `metrics=[{', '.join(missing)}]` counts it"
                )
        return result

    def _seen_info(self, recipe: Recipe) -> DataInfo:
        """Describe the data as the recipe's task sees them."""
        info = self.info()
        return replace(info, image_shape=recipe.task.shape(info.image_shape))

    def digest(self, file: Path) -> str | None:
        """Return the SHA-256 that a finished run has recorded of a file in its folder."""
        result = self.result()
        return result.files.get(str(file.relative_to(self.path))) if result else None

    def refuse_damaged(self, file: Path) -> None:
        """Check that a file is the one that the finished run has written.

        Raises:
            RunError: it is damaged, or another run's.
        """
        way_out = (
            AGAIN if file == self.student_file else f"{ANEW}, or delete the file to do without it"
        )
        files.refuse_other(file, self.digest(file), self.result_file, way_out)

    def keep(self, file: Path, content: bytes) -> None:
        """Write a file of weights, and record its digest."""
        files.write_atomically(file, content)
        self.digests[str(file.relative_to(self.path))] = hashlib.sha256(content).hexdigest()

    def finish(self, result: Result) -> Result:
        """Write result.json with the digests of all files that the run leaves; return the result
        with them.
        """
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
        """Return the file of the student's weights after an epoch of a stage."""
        return self.path / "snapshots" / stage / f"epoch-{epoch:04d}.safetensors"

    def best_epochs(self, stage: int) -> Path:
        """Return the folder of the weights that a stage averages."""
        return self.path / "best-epochs" / f"stage{stage}"

    def snapshots(self) -> dict[int, Path]:
        """Return the snapshots of the last stage, which trained the resulting student, by their
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
        """Drop the rows of metrics.jsonl after a checkpoint: all beyond these numbers of finished
        epochs and optimizer steps.

        Returns:
            The losses, a sentence each: damaged lines, which are dropped too, and missing epochs.
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
        """Read the lines of metrics.jsonl of one kind ("step" or "epoch").

        Raises:
            RunError: a line is damaged, or the file is not the one of the finished run.
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
def _fingerprint(path: Path, inode: int, size: int, modified: int) -> str:
    """Read the fingerprint in a run.json; the file's size and time in the cache key make a changed
    file be read again.
    """
    return RunFolder(path).about()["fingerprint"]
