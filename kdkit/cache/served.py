"""A teacher that answers from other processes, which `kdkit serve` runs."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from kdkit.cache import fingerprint, wire
from kdkit.cache.connections import Connection
from kdkit.cache.heads import HIDDEN, Head
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.model_source import TeacherOptions
from kdkit.contracts.records import Inputs, Outputs
from kdkit.errors import RunError, one_line
from kdkit.models.tapped import features_only, mask_of
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
