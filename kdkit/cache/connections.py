"""Connections to servers of teachers, which outlive that a server is lost."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kdkit.cache import wire
from kdkit.errors import RunError, one_line

AGAIN = 1.0  # seconds until a server that does not answer is asked again
SILENT = 600.0  # seconds after which a connection without an answer counts as lost


class Connection:
    """One server, asked in order by a thread of its own."""

    def __init__(self, address: str, role: str, tell: Callable[[str], None]) -> None:
        self.address, self._role, self.tell = address, role, tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"teacher at {address}")
        self._closed = threading.Event()
        self._open: http.client.HTTPConnection | None = None

    def ask(self, path: str, body: bytes | None = None, asked: Any = None) -> Future[Any]:
        """Send a request, until it is answered: a future of the body and of the layouts in it.

        Raises, in the future:
            RunError: the server refuses it.
        """
        return self._thread.submit(self._ask, path, body, asked)

    def close(self) -> None:
        self._closed.set()
        self._thread.submit(self._hang_up)
        self._thread.shutdown()

    def _hang_up(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    def _ask(self, path: str, body: bytes | None, asked: Any) -> tuple[bytes, str]:
        lost = False
        while not self._closed.is_set():
            try:
                status, answer, last = self._once(path, body, asked)
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                if not lost:
                    reason = one_line(str(error))
                    self.tell(
                        f"{self._role}: {self.address} does not answer ({reason}); it is asked"
                        " again until it does"
                    )
                lost = True
                self._closed.wait(AGAIN)
                continue
            if lost:
                self.tell(f"{self._role}: {self.address} answers again")
            if status != http.client.OK:
                says = one_line(answer.decode(errors="replace"))
                raise RunError(f"{self._role}: {self.address} refuses: {says}")
            return answer, last
        raise RunError(f"{self._role}: {self.address} is not asked any more")

    def _once(self, path: str, body: bytes | None, asked: Any) -> tuple[int, bytes, str]:
        if self._open is None:
            self._open = http.client.HTTPConnection(self.address, timeout=SILENT)
        headers = {
            "Authorization": wire.authorization(os.environ.get(wire.TOKEN, "")),
            wire.ASKED: json.dumps(asked),
        }
        self._open.request("GET" if body is None else "POST", path, body, headers)
        response = self._open.getresponse()
        return response.status, response.read(), response.headers.get(wire.LAST, "[]")
