"""Set-up of processes that load data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_to_parent(worker: int) -> None:
    """Let only the parent end a data-loading process, not a signal to all processes."""
    # a terminal or a launcher signals the whole group; training then saves, and still needs batches
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    sender = None
    # without a parent, any sender may end it
    while sender is None or (parent is not None and sender != parent.pid):
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    # `sys.exit` in a thread would end the thread alone
    os._exit(0)
