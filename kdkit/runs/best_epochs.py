"""Keeps the weights of a stage's best epochs on validation in files, and computes the mean of those
weights.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kdkit.errors import RunError
from kdkit.files import write_atomically

Ranked = list[
    tuple[int, float]
]  # (epoch, deciding score on validation, more is better), best first


class BestEpochs:
    """The best epochs on validation of each student of a stage, by the student's number; of equally
    good epochs, the earlier.

    A file is removed only when no existing checkpoint names its epoch any more: a killed run
    resumes from one of the two newest.

    Args:
        folder: of the files.
        count: number of epochs for each student.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.ranked: dict[int, Ranked] = {}
        self.digests: dict[str, str] = {}  # SHA-256 of the files by name
        self._saved: set[Path] = set()  # files that the newest checkpoint names

    def offer(self, student: int, epoch: int, score: float) -> bool:
        """Rank one more epoch; return whether it is among the best so far, so that its weights must
        be written.
        """
        # ties: the earlier epoch first
        ranked = sorted(
            [*self.ranked.get(student, []), (epoch, score)], key=lambda one: (-one[1], one[0])
        )
        self.ranked[student] = ranked[: self.count]
        return epoch in self.epochs(student)

    def epochs(self, student: int) -> tuple[int, ...]:
        """Return a student's best epochs so far, ascending."""
        return tuple(sorted(epoch for epoch, _ in self.ranked.get(student, [])))

    def write(self, student: int, epoch: int, weights: bytes) -> dict[str, str]:
        """Write a student's weights after an epoch, as safetensors; record their digest by the
        file's name.
        """
        write_atomically(self._file(student, epoch), weights)
        return {self._file(student, epoch).name: hashlib.sha256(weights).hexdigest()}

    def load(
        self, ranked: dict[int, Ranked], digests: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Restore the state from a checkpoint; one of an older kdkit has no digests."""
        self.digests = dict(digests)
        self.ranked = {
            student: [(int(epoch), float(score)) for epoch, score in each]
            for student, each in ranked.items()
        }
        # The checkpoint that was just loaded names them.
        self._saved = set(self._files())

    def tidy(self, *, for_good: bool) -> None:
        """Remove files that are no longer named, after a checkpoint has been saved; `for_good` if
        it is the only remaining one.
        """
        named = set(self._files())
        # a killed run may resume from the checkpoint before the newest, which names other files
        needed = named if for_good else named | self._saved
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path not in needed:
                path.unlink()
        self._saved = named

    def discard(self) -> None:
        """Remove every file: another stage follows, so that this one leaves nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def mean(self, student: int) -> dict[str, Tensor]:
        """Return the mean of a student's weights over its best epochs; for non-floating tensors,
        those of the best epoch.

        Raises:
            RunError: a file is gone or damaged.
        """
        ranked = self.ranked[student]
        best = self._read(student, ranked[0][0])
        # summed in fp64 and in a fixed order, so that the mean is reproducible
        sums = {name: value.double() for name, value in best.items() if value.is_floating_point()}
        for epoch in sorted(epoch for epoch, _ in ranked[1:]):
            other = self._read(student, epoch)
            for name, total in sums.items():
                if name not in other or other[name].shape != total.shape:
                    says = (
                        f"'{name}' has other shapes in epochs {ranked[0][0]} and {epoch}, so that"
                        " `train.average_best` has no mean to take"
                    )
                    raise RunError(f"{self.folder}: {says}; leave it out")
                # Adds to the fp64 tensor in place, so that the weights of one epoch at a time are
                # in memory.
                total += other[name]
        return {
            name: (sums[name] / len(ranked)).to(value.dtype) if name in sums else value
            for name, value in best.items()
        }

    def _read(self, student: int, epoch: int) -> dict[str, Tensor]:
        path = self._file(student, epoch)
        try:
            content = path.read_bytes()
            written = self.digests.get(path.name)
            # An epoch of an older kdkit has no digest: its file is read as it is.
            if written and written != hashlib.sha256(content).hexdigest():
                raise SafetensorError("it is not the file that was written")
            found: dict[str, Tensor] = load(content)
        except (OSError, SafetensorError) as error:
            says = (
                f"{path}: the weights of epoch {epoch}, which `train.average_best` takes in, are"
                " gone or damaged"
            )
            raise RunError(
                f"{says} ({' '.join(str(error).split())}); `--restart` begins anew"
            ) from None
        return found

    def _file(self, student: int, epoch: int) -> Path:
        return self.folder / f"student{student + 1}-epoch-{epoch:04d}.safetensors"

    def _files(self) -> Iterator[Path]:
        return (
            self._file(student, epoch)
            for student, ranked in self.ranked.items()
            for epoch, _ in ranked
        )
