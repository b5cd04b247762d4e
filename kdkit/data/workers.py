"""Set-up of processes that load data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_to_parent(worker: int) -> None:
    """Ignore, in a process that loads data, signals that a terminal or a launcher sends to all
    processes; only its parent may end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while (
        (said := signal.sigwaitinfo({signal.SIGTERM}))
        and parent is not None
        and said.si_pid != parent.pid
    ):
        pass
    os._exit(0)
