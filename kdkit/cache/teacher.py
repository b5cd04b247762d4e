"""Caches a frozen teacher's answers: the first epoch writes, later ones and other runs read."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kdkit.cache.packing import KeptAnswers, Slots
from kdkit.cache.store import AnswerStore
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.data.wrapping import WrappedLoader
from kdkit.errors import RunError
from kdkit.finite import FiniteAnswers

# How far an answer may be from the kept one, in parts of its largest number, and still be this
# teacher's. In other batches a network rounds otherwise: in fp32 by some 1e-6 on a processor and,
# with TF32, some 1e-3 on a GPU; in half precision by some 1e-3 (fp16) or 1e-2.
FAR = {None: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
FAR_ON_CPU = 1e-4  # in fp32
# and by this because it is kept in fewer digits
ROUNDED = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 0.0}
OTHER_IMAGES = (
    "is shown other samples than those of the batch (further views, changed ones), whose answers"
    " cannot be kept; leave `cache` out"
)

Forward = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class _Rows:
    """The rows in the store of a batch's images; copied to the host asynchronously."""

    rows: Tensor
    arrived: torch.Event | None = None

    def here(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.rows


@dataclass(eq=False)
class TeacherCache:
    """One teacher's answers: `teacher.answers = partial(cache.answer, forward=teacher.forward)`.

    Everything it writes it reads back, so that training gives the same numbers with an empty cache,
    a full one, and one in between. The first answer from the disk is compared with the teacher's
    own. The teacher is asked again for a damaged one.

    Attributes:
        store: open.
        kept: the form of an answer in a row of it.
        slots: the views of an image.
        images: in the dataset's whole training part.
        precision: the type that training autocasts to (None: fp32).
        role: name of the teacher in messages.
        tell: called with a message about damaged answers.
    """

    store: AnswerStore
    kept: KeptAnswers
    slots: Slots
    images: int
    precision: torch.dtype | None
    role: str
    tell: Callable[[str], None] = lambda _: None
    # the images of a batch -> _Rows; weak, so that no batch is kept alive
    _shown: Any = field(default_factory=WeakIdKeyDictionary, init=False)
    _compared: bool = field(default=False, init=False)

    def loader(self, train: TrainLoader) -> TrainLoader:
        """Wrap the training batches in the cached views; the cache then knows their images."""
        return _KeptViews(train, self)

    def close(self) -> None:
        """Close the files."""
        self.store.close()

    def answer(self, inputs: Inputs, forward: Forward) -> Outputs:
        """Return the answer to a batch's images, in fp32: from disk, or from a stored forward.

        Raises:
            RunError: the images belong to no batch; the disk is nearly full; the cache is another
                teacher's.
        """
        images = first_tensor(inputs)
        if images not in self._shown:
            raise RunError(f"{self.role} {OTHER_IMAGES}")
        rows: Tensor = self._shown[images].here()
        # the first answer is asked for even if it is there, to be compared
        if not self._compared or not bool(self.store.known(rows).all()):
            self.keep(rows, inputs, forward)
        values = self.store.read(rows, pinned=images.device.type == "cuda")
        if bool(self.store.damaged(rows, values).any()):
            self.tell_of_damage()
            self.keep(rows, inputs, forward)
            values = self.store.read(rows, pinned=images.device.type == "cuda")
        return self.kept.unpack(
            {name: value.to(images.device, non_blocking=True) for name, value in values.items()},
            self.role,
        )

    def keep(self, rows: Tensor, inputs: Inputs, forward: Forward) -> None:
        """Ask the teacher, and write its answers to images whose rows do not exist yet.

        Raises:
            RunError: see `answer`.
        """
        with torch.no_grad(), autocast(first_tensor(inputs).device, self.precision):
            packed = {name: value.cpu() for name, value in self.kept.pack(forward(inputs)).items()}
        # NaN must not reach the disk, from where other runs would read it
        finite = FiniteAnswers(self.role)
        finite.note(packed)
        finite.verify()
        if not self._compared:
            self._compare(rows, packed, first_tensor(inputs).device)
        self.store.write(rows, packed)

    def tell_of_damage(self) -> None:
        """Report that answers are damaged."""
        self.tell(
            f"{self.store.path}: answers of {self.role} are damaged, and it is asked for them again"
        )

    def rows(self, slot: Tensor | int, index: Tensor) -> Tensor:
        """Return the rows of the answers to images with those indices (N,), in their slots; on
        their device.
        """
        return slot * self.images + index

    def note(self, inputs: Inputs, view: int, index: Tensor) -> None:
        """Record which images these are, in which view."""
        images = first_tensor(inputs)
        rows = self.rows(self.slots.shown(view, index), index)
        if rows.is_cuda:
            # pinned and asynchronous: otherwise the host would wait for the device in every step
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(
                rows, non_blocking=True
            )
            arrived = torch.Event(rows.device)
            arrived.record()
            self._shown[images] = _Rows(host, arrived)
        else:
            self._shown[images] = _Rows(rows.cpu())

    def _compare(self, rows: Tensor, packed: dict[str, Tensor], device: torch.device) -> None:
        """Compare stored answers with the teacher's: the fingerprint cannot cover everything.

        Raises:
            RunError: they differ.
        """
        whole = self.store.whole(rows)
        if not bool(whole.any()):
            return
        for name, stored in self.store.read(rows[whole]).items():
            own = packed[name][whole].float()
            far = self._far(stored.dtype, device) * float(own.abs().max()) + 1e-6
            # not the classes of the k largest logits: rounding may exchange two of them
            if stored.is_floating_point() and not torch.allclose(
                own, stored.float(), rtol=0, atol=far, equal_nan=True
            ):
                clear = f"kdkit cache --clear {self.store.path.name} --dir {self.store.path.parent}"
                raise RunError(
                    f"{self.store.path} does not hold what {self.role} says; remove it with"
                    f" `{clear}`"
                )
        self._compared = True

    def _far(self, stored: torch.dtype, device: torch.device) -> float:
        on_cpu = self.precision is None and device.type == "cpu"
        return (FAR_ON_CPU if on_cpu else FAR[self.precision]) + ROUNDED.get(stored, 0.0)


class _KeptViews(WrappedLoader):
    """Training batches in the views that a cache stores."""

    def __init__(self, loader: TrainLoader, cache: TeacherCache) -> None:
        super().__init__(loader)
        self._cache = cache

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        stored = self._cache.slots.view(number if view is None else view)
        if self._cache.slots.mixed:  # the order decides which images are mixed
            number = stored
        waiting: collections.deque[Batch] = collections.deque()
        try:
            for batch in self._loader.epoch(number, start, stored, arrange):
                self._cache.note(batch.inputs, stored, batch.index)
                waiting.append(batch)
                # read one batch ahead: by then, the GPU has copied the image numbers to the host
                if len(waiting) > batch.index.is_cuda:
                    yield waiting.popleft()
            yield from waiting
        # also for an epoch that is stopped, whose answers are as good
        finally:
            self._cache.store.commit()


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Autocast to the training precision wherever a teacher is asked: schedules also ask before
    training begins.
    """
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)
