"""Signals become wishes, and come to nothing where data is only loaded."""

import os
import signal
import threading
import time

import pytest
from training import PATIENCE, PROCESSES, forked

from kdkit.data.workers import leave_to_parent
from kdkit.runs.interrupts import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop_and_the_second_ends_the_process(number):
    caught = []
    before = signal.signal(number, lambda *_: caught.append(1))
    try:
        with StopRequest() as stop:
            assert stop.signal is None
            os.kill(os.getpid(), number)
            assert (stop.signal, caught) == (number, [])
            os.kill(os.getpid(), number)
            assert caught == [1]
        os.kill(os.getpid(), number)
        assert caught == [1, 1]
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_no_signal_is_caught():
    found = []

    def enter():
        with StopRequest() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None]


def _worker(ready):
    leave_to_parent(0)
    ready.set()
    time.sleep(60)


def _send(pid, number):
    os.kill(pid, number)


def test_a_loader_worker_ignores_signals_and_is_ended_by_its_parent():
    ready = PROCESSES.Event()
    worker = forked(_worker, ready)
    worker.start()
    assert ready.wait(30)
    for number in (signal.SIGINT, signal.SIGTERM):
        stranger = forked(_send, worker.pid, number)
        stranger.start()
        stranger.join()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == 0
