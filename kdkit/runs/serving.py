"""Serves the teachers of a recipe to runs in other processes: `kdkit serve`."""

from __future__ import annotations

import contextlib
import hmac
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from kdkit.cache import served, wire
from kdkit.cache.heads import Head
from kdkit.cache.teacher import autocast
from kdkit.contracts.inputs import Shape
from kdkit.contracts.layers import resolve
from kdkit.contracts.records import Inputs, Outputs
from kdkit.errors import KdkitError, RunError, one_line
from kdkit.models.devices import device_of
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe
from kdkit.runs import checks
from kdkit.runs.folder import RunFolder
from kdkit.runs.networks import ModelFactory
from kdkit.runs.progress import Reporter
from kdkit.runs.training import accelerator_for, trained_teachers

MOST_BYTES = 4_000_000_000  # of a batch


@dataclass
class Teachers:
    """The teachers of a recipe, which answer one batch at a time.

    Attributes:
        models: by name.
        about: what is told of each: the fingerprint of its description, the classes of its network,
            its own recipe, and its classifier.
        heads: the classifiers, or why there is none.
    """

    models: Mapping[str, TappedModel]
    about: Mapping[str, Any]
    heads: Mapping[str, Head | KdkitError]
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _views: dict[tuple[str, tuple[str, ...], bool], TappedModel] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> Teachers:
        """Build the teachers of a recipe; those of other recipes are trained if they are not yet.

        Raises:
            KdkitError: as `train` does.
        """
        info = checks.make(recipe, Reporter().say).info
        folder = RunFolder(recipe.spec.run.folder / recipe.spec.name)
        trained = trained_teachers(recipe, folder.path)
        device = accelerator_for(recipe, folder).device
        factory = ModelFactory(recipe, info, trained, device=device)
        models = factory.teachers()
        if not models:
            raise RunError("this recipe has no teacher")
        about: dict[str, dict[str, Any]] = {
            name: {"key": served.key(recipe, name), "classes": factory.classes.own(name)}
            for name in models
        }
        for name, known in trained.items():
            result = known.run.result() if known.run else None
            about[name] |= {
                "network": result.network if result else None,
                "scores": dict(known.scores),
                "outputs": known.outputs,
            }
        heads = {name: _head(model, info.train_shape) for name, model in models.items()}
        for name, head in heads.items():
            about[name]["head"] = head.about() if isinstance(head, Head) else None
        return cls(models, about, heads)

    def head(self, asked: Mapping[str, Any]) -> bytes:
        """Return the classifier of a teacher.

        Raises:
            KdkitError: there is no such teacher, or it has none.
        """
        self._refuse_other(asked)
        if isinstance(head := self.heads[asked["teacher"]], KdkitError):
            raise head
        return head.packed()

    def answer(self, asked: Mapping[str, Any], inputs: Inputs) -> Outputs:
        """Answer a batch as the teacher would in the run itself.

        Raises:
            KdkitError: there is no such teacher or layer, or the batch does not fit.
        """
        name, layers, logits = asked["teacher"], tuple(asked["layers"]), bool(asked["logits"])
        self._refuse_other(asked)
        model = self.models[name]
        device = device_of(model.module)
        shown = (
            inputs.to(device)
            if isinstance(inputs, torch.Tensor)
            else {key: value.to(device) for key, value in inputs.items()}
        )
        precision = wire.PRECISIONS[asked["precision"]]
        with self._busy, torch.no_grad(), autocast(device, precision):
            return self._view(name, layers, logits)(shown)

    def _refuse_other(self, asked: Mapping[str, Any]) -> None:
        if (name := asked["teacher"]) not in self.models:
            raise RunError(f"no teacher is called '{name}', only {', '.join(self.models)}")
        # a run outlives its server, in whose place this one may be
        if any(asked.get(known, own) != own for known, own in self.about[name].items()):
            raise RunError(f"'{name}' is another here than where this run began")

    def _view(self, name: str, layers: Sequence[str], logits: bool) -> TappedModel:
        key = name, tuple(layers), logits
        if key not in self._views:
            model = self.models[name]
            view = model.view((), needs_logits=logits, answers=None)
            view.layers = {layer: resolve(layer, model.module) for layer in layers}
            self._views[key] = view
        return self._views[key]


def _head(model: TappedModel, shape: Shape) -> Head | KdkitError:
    try:
        return Head.of(model, shape)
    except KdkitError as error:
        return error


def here(recipe: Recipe) -> list[str]:
    """Return the overrides by which the teachers of a recipe answer here, even if it says where
    they are served: both sides may read one file.
    """
    away = [name for name in recipe.spec.all_teachers() if served.addresses(recipe, name)]
    return [".".join(map(str, [*recipe.spec.place_of(name), "at=null"])) for name in away]


class Server(ThreadingHTTPServer):
    """Answers runs that know the token; `serve_forever()` begins.

    Raises:
        RunError: the address is taken, or is none of this machine.
    """

    daemon_threads = True

    def __init__(self, teachers: Teachers, host: str, port: int, token: str) -> None:
        self.teachers, self.token = teachers, token
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(f"{host}:{port}: {error}") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a run that ends while it is answered."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """HOST:PORT, as a recipe's `at` has it."""
        return f"{self.server_address[0]!s}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    # an answer's head and body are sent apart: the body would wait until the head has arrived
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == wire.ABOUT:
            self._send(HTTPStatus.OK, json.dumps(self.server.teachers.about).encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, b"no such page")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"no length, or too large a batch")
            return
        data = self.rfile.read(int(length))
        try:
            asked = json.loads(self.headers.get(wire.ASKED, ""))
            if self.path == wire.HEAD:
                body, last = self.server.teachers.head(asked), "[]"
            else:
                answer = self.server.teachers.answer(asked, wire.unpack_inputs(data))
                body, last = wire.pack_answer(answer, logits=asked["logits"])
        except (KdkitError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._send(HTTPStatus.BAD_REQUEST, one_line(str(error)).encode())
        except Exception as error:  # of the network's own code
            says = f"{type(error).__name__}: {one_line(str(error))}"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, says.encode())
        else:
            self._send(HTTPStatus.OK, body, last)

    def _allowed(self) -> bool:
        given, wanted = self.headers.get("Authorization", ""), wire.authorization(self.server.token)
        if hmac.compare_digest(given.encode(), wanted.encode()):
            return True
        # what else was sent is not read
        self.close_connection = True
        says = f"this is another token than the server's; both sides read {wire.TOKEN}"
        self._send(HTTPStatus.UNAUTHORIZED, says.encode())
        return False

    def _send(self, status: HTTPStatus, body: bytes, last: str = "[]") -> None:
        with contextlib.suppress(ConnectionError):  # a run that was stopped meanwhile
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header(wire.LAST, last)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""
