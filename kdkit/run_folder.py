"""The folder of a run: the resolved recipe, versions, metrics as they come, checkpoints, the student, the result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdkit import recipe as recipes
from kdkit.checkpoints import Checkpoints, write_atomically
from kdkit.errors import RunError
from kdkit.recipe import Recipe

VERSIONS = ("kdkit", "torch", "torchvision", "timm", "accelerate")


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        folder: the run folder.
        name, seed: the recipe's.
        test: metrics of the student after the last epoch (`kdkit.evaluate.metrics`).
        validation: likewise on the validation split, if there is one.
        best: of the epoch with the best validation accuracy: `epoch`, `validation` and `test` metrics.
        teacher: the teacher's own metrics on the test data.
        parameters: of the student.
        seconds: training time, measurements included.
    """

    folder: Path
    name: str
    seed: int
    test: Mapping[str, float]
    parameters: int
    seconds: float
    epochs: int
    validation: Mapping[str, float] | None = None
    best: Mapping[str, Any] | None = None
    teacher: Mapping[str, float] | None = None
    peers: tuple[Mapping[str, float], ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def student(self) -> Path:
        """The student's weights, safetensors."""
        return self.folder / "student.safetensors"


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.student_file = path / "student.safetensors"
        self.best_file = path / "best.safetensors"
        self.checkpoints = Checkpoints(path / "checkpoints")

    def claim(self, recipe: Recipe) -> None:
        """Make the folder for this recipe, or find it made for the same one.

        Raises:
            RunError: it belongs to another recipe; the message says in which keys.
        """
        marker = self.path / "run.json"
        if marker.is_file():
            theirs = json.loads(marker.read_text())
            if theirs["fingerprint"] != recipe.fingerprint:
                keys = ", ".join(_differences(theirs["content"], recipe.content())) or "kdkit's own defaults"
                raise RunError(
                    f"{self.path} holds a run of another recipe (different: {keys}); give this one another `name:` or `--run FOLDER`, "
                    "or throw the old one away with `--restart`"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunError(f"{self.path} exists and is not a run folder; give the recipe another `name:` or `--run FOLDER`")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, recipe.dump().encode())
        about = {"fingerprint": recipe.fingerprint, "content": recipe.content(), "versions": _versions()}
        write_atomically(marker, json.dumps(about, indent=1).encode())

    def holds(self, recipe: Recipe) -> bool:
        """Whether a run of this very recipe is here."""
        marker = self.path / "run.json"
        return marker.is_file() and json.loads(marker.read_text())["fingerprint"] == recipe.fingerprint

    def clear(self) -> None:
        """Throw the run away; a folder that is not a run is left alone."""
        if (self.path / "run.json").is_file():
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def locked(self, *, only: bool = True) -> Iterator[None]:
        """Keep other runs from training in this folder (`only` the main process asks); the lock ends with the process, however it ends.

        Raises:
            RunError: another process trains here.
        """
        if not only:
            yield
            return
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training in this folder") from None
            yield

    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            RunError: this is no run folder.
        """
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: no run folder (it has no recipe.yaml)")
        return recipes.load(self.recipe_file)

    def result(self) -> Result | None:
        """The result, once the run is finished."""
        if not self.result_file.is_file():
            return None
        saved = json.loads(self.result_file.read_text())
        return Result(folder=self.path, **{**saved, "peers": tuple(saved["peers"]), "warnings": tuple(saved["warnings"])})

    def finish(self, result: Result) -> None:
        saved = asdict(result)
        del saved["folder"]
        write_atomically(self.result_file, (json.dumps(saved, indent=1) + "\n").encode())

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics_file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def logged(self) -> int:
        """Length of metrics.jsonl in bytes."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def forget(self, after: int) -> None:
        """Cut metrics.jsonl to its first `after` bytes: later lines will be made again."""
        if self.metrics_file.exists():
            with self.metrics_file.open("r+b") as stream:
                stream.truncate(min(after, self.logged()))

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind ("step" or "epoch")."""
        if not self.metrics_file.exists():
            return []
        lines = (json.loads(line) for line in self.metrics_file.read_text().splitlines() if line.endswith("}"))
        return [line for line in lines if line["kind"] == kind]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{prefix}.{i}")
    elif old != new:
        yield prefix
