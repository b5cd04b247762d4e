"""A teacher that answers from other processes, which `kdkit serve` runs."""

from __future__ import annotations

import collections
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kdkit.cache import fingerprint, wire
from kdkit.cache.connections import Connection
from kdkit.cache.heads import HIDDEN, Head
from kdkit.cache.teacher import Forward
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.model_source import TeacherOptions
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.data.wrapping import WrappedLoader
from kdkit.errors import RunError, one_line
from kdkit.models.tapped import TappedModel, features_only, mask_of
from kdkit.recipe import Recipe, content_of


def addresses(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return where a teacher of the recipe is served; none if it answers here."""
    options = recipe.spec.all_teachers()[name]
    return (options.at or ()) if isinstance(options, TeacherOptions) else ()


def key(recipe: Recipe, name: str) -> str:
    """Return the fingerprint of a teacher as its recipe describes it; both sides compare it."""
    content = content_of(recipe.spec.all_teachers()[name])
    own = {k: v for k, v in content.items() if k not in ("cache", "name")}
    return fingerprint.fingerprint({"task": recipe.task.name, "teacher": own})


@dataclass(frozen=True)
class _Coming:
    """An answer that is under way.

    Attributes:
        answer: a future of it.
        layers: asked for.
        precision: the type that the caller autocasts to (None: fp32).
        head: makes the logits of it (None: they are in it, or nobody reads them).
    """

    answer: Future[Any]
    layers: Sequence[str]
    precision: torch.dtype | None
    head: Head | None


class ServedTeacher:
    """A teacher's answers from the servers that the recipe names.

    It takes the place of the teacher's forward (`TappedModel.elsewhere`) and, in training, asks for
    the answers to the next batches while the student learns from this one.

    Args:
        recipe: of the run.
        name: of the teacher.
        role: its name in messages.
        tell: called with a message about a server that is lost or back.
        classes: of its network, if they are known.

    Attributes:
        close: ends the connections.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        role: str,
        tell: Callable[[str], None] = lambda _: None,
        classes: int | None = None,
    ) -> None:
        self._name = name
        self._servers = [Connection(a, role, tell) for a in addresses(recipe, name)]
        self._role = role
        self._turn = 0
        self._compared = False
        options = recipe.spec.all_teachers()[name]
        self._hidden = isinstance(options, TeacherOptions) and options.sends == "hidden"
        self._head: Head | None = None
        # what each request says of the teacher, as another server may begin at the address
        self._known: dict[str, Any] = {"teacher": name, "key": key(recipe, name)}
        if classes is not None:
            self._known["classes"] = classes
        # also where nobody closes it: networks are built to be measured, too
        self.close = weakref.finalize(self, _close, self._servers)
        self.close.atexit = False  # connections end with the process, and threads have ended then

    def __len__(self) -> int:
        return len(self._servers)

    def about(self) -> dict[str, Any]:
        """Return what the first server says of its teacher, once all serve this one.

        Raises:
            RunError: one serves another teacher.
        """
        found: list[dict[str, Any]] = []
        for server in self._servers:
            try:
                known = json.loads(server.ask(wire.ABOUT).result()[0])
                teachers = {name: dict(about) for name, about in known.items()}
            except (ValueError, AttributeError, TypeError):
                says = f"{self._role}: what listens at {server.address} is no `kdkit serve`"
                raise RunError(says) from None
            if self._name not in teachers:
                served = ", ".join(teachers)
                raise RunError(
                    f"{self._role}: {server.address} serves no '{self._name}', only {served}"
                )
            found.append(teachers[self._name])
            if found[-1].get("key") != self._known["key"]:
                raise RunError(
                    f"{self._role}: {server.address} serves another '{self._name}' than this"
                    " recipe describes"
                )
            if (classes := found[-1].get("classes")) != self._known.get("classes", classes):
                says = f"a '{self._name}' of {classes} classes, not {self._known['classes']}"
                raise RunError(f"{self._role}: {server.address} serves {says}")
        if self._hidden and self._head is None:
            self._fetch_head([one.get("head") for one in found])
        self._compared = True
        return found[0]

    def _fetch_head(self, told: Sequence[Any]) -> None:
        """Ask for the classifier, once all servers have told of the same."""
        asked = self._servers[0]
        data, _ = asked.ask(wire.HEAD, b"", self._known).result()
        for server, about in zip(self._servers, told, strict=True):
            try:
                self._head = Head.unpacked(data, about or {})
            except (RunError, KeyError, TypeError):
                says = f"{server.address} has another classifier than {asked.address} sends"
                raise RunError(f"{self._role}: {says}") from None
        self._known["head"] = told[0]

    def send(
        self,
        inputs: Inputs,
        layers: Sequence[str],
        precision: torch.dtype | None,
        *,
        logits: bool,
    ) -> _Coming:
        """Ask the next server for the answer to a batch."""
        if not self._compared:
            self.about()
        server = self._servers[self._turn % len(self._servers)]
        self._turn += 1
        head = self._head if logits else None
        asked = {
            **self._known,
            "layers": [*dict.fromkeys([*layers, HIDDEN] if head else layers)],
            "logits": logits and head is None,
            "precision": wire.name_of(precision),
        }
        answer = server.ask(wire.ANSWER, wire.pack_inputs(inputs), asked)
        return _Coming(answer, layers, precision, head)

    def received(self, coming: _Coming, inputs: Inputs) -> Outputs:
        """Wait for an answer, and bring it to the device of its images.

        Raises:
            RunError: the server refuses to answer, or sends something else.
        """
        answer, images = coming.answer.result(), first_tensor(inputs)
        try:
            logits, layers = wire.unpack_answer(*answer)
            found = {name: value.to(images.device) for name, value in layers.items()}
            features = {name: found[name] for name in coming.layers}
            if coming.head is not None:
                self._head = coming.head.to(images.device)  # once
                logits = self._head(found[HIDDEN], coming.precision)
            if logits is not None and len(logits) != len(images):
                raise RunError(f"{len(logits)} rows for {len(images)} samples")
        # such as of another version of kdkit
        except (RunError, KeyError, ValueError, TypeError) as error:
            says = f"what its server sends is not what was asked for ({one_line(str(error))})"
            raise RunError(f"{self._role}: {says}") from None
        if logits is None:
            return features_only(features, self._role, mask_of(inputs))
        return Outputs(logits.to(images.device), features, mask=mask_of(inputs))

    def __call__(self, inputs: Inputs, layers: Sequence[str], needs_logits: bool) -> Outputs:
        """Answer as the network would here, in the autocast type of the caller."""
        kind = first_tensor(inputs).device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.received(self.send(inputs, layers, precision, logits=needs_logits), inputs)

    def tell_by(self, tell: Callable[[str], None]) -> None:
        """Set what is called with messages."""
        for server in self._servers:
            server.tell = tell


def _close(servers: Sequence[Connection]) -> None:
    for server in servers:
        server.close()


class AskedAhead:
    """Asks a served teacher for the answers to coming batches.

    Args:
        served: the teacher's servers.
        teacher: the model that they answer for.
        precision: the type that training autocasts to (None: fp32).
    """

    def __init__(
        self, served: ServedTeacher, teacher: TappedModel, precision: torch.dtype | None
    ) -> None:
        self._served, self._teacher, self._precision = served, teacher, precision
        # the images of a batch -> the answer that is under way, or None; weak, so that no batch is
        # kept alive
        self._coming: Any = WeakIdKeyDictionary()
        self._read = True  # whether the answers to batches are read, as far as is known

    def loader(self, train: TrainLoader) -> TrainLoader:
        """Wrap the training batches, to see which ones are coming."""
        return _Announced(train, self, len(self._served))

    def announce(self, batch: Batch) -> None:
        """Ask for the answer to a batch that is coming, unless nobody reads such answers."""
        self._coming[first_tensor(batch.inputs)] = (
            self._served.send(
                batch.inputs,
                [*self._teacher.layers],
                self._precision,
                logits=self._teacher.needs_logits,
            )
            if self._read
            else None
        )

    def leave(self, batch: Batch) -> None:
        """Note that the step with a batch is over."""
        if self._coming.pop(first_tensor(batch.inputs), None) is not None:
            self._read = False  # a stage without this teacher, or with views of the images

    def answer(self, inputs: Inputs, forward: Forward) -> Outputs:
        """Return the answer to a batch, which was asked for before, or to other images."""
        images: Tensor = first_tensor(inputs)
        if images not in self._coming:
            return forward(inputs)
        coming = self._coming[images]
        self._coming[images] = None
        if coming is None:
            self._read = True
            return forward(inputs)
        return self._served.received(coming, inputs)

    def close(self) -> None:
        """Ask nothing any more."""
        self._served.close()


class _Announced(WrappedLoader):
    """Training batches, of which a few are read ahead and announced."""

    def __init__(self, loader: TrainLoader, ahead: AskedAhead, depth: int) -> None:
        super().__init__(loader)
        self._ahead, self._depth = ahead, depth

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        waiting: collections.deque[Batch] = collections.deque()
        for batch in self._loader.epoch(number, start, view, arrange):
            self._ahead.announce(batch)
            waiting.append(batch)
            if len(waiting) > self._depth:
                yield from self._shown(waiting.popleft())
        while waiting:
            yield from self._shown(waiting.popleft())

    def _shown(self, batch: Batch) -> Iterator[Batch]:
        yield batch
        self._ahead.leave(batch)
