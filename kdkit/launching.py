"""Starts a command in several processes of this machine, and reports their failure in one line;
takes a process out of its launch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence

from kdkit.errors import RecipeError

ENDED_WITH_ANOTHER = 1  # exit code of a process that ends because another one has ended
# exit codes of processes that end, or are terminated, after the first
FOLLOWING = (ENDED_WITH_ANOTHER, -signal.SIGTERM, 128 + signal.SIGTERM)
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GOES_ON = "the same command goes on from the last checkpoint"
WORKER_ENDED = (
    f"a process that loads data has ended unexpectedly (killed, or out of memory?); {GOES_ON}"
)
LOST = (
    "gloo/transport",
    "remote process exit",
    "Connection reset by peer",
    "Broken pipe",
    "failed to recv",
)
"""Texts in torch's errors, by backend, when a process waits for one that no longer exists."""


def of_launch() -> tuple[int, int]:
    """Return this process's number, from 0, and the number of processes, as set by the launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Check whether this is the launch's first process, or was started alone."""
    return of_launch()[0] == 0


def leave_launch() -> None:
    """Leave the process group, on the device that the launcher meant for this process: from here
    on, torch and Accelerate see a single process.
    """
    import torch
    from accelerate.state import PartialState

    rank, world = of_launch()
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Accelerate caches the group and its environment for the whole process
    PartialState._reset_state()
    for name in OF_A_LAUNCH:
        os.environ.pop(name, None)


def must_launch(processes: int) -> bool:
    """Check whether `processes` processes are still to be started; this may be one of them.

    Raises:
        RecipeError: a launcher has started another number of them.
    """
    _, world = of_launch()
    if processes == world:
        return False
    if world > 1:
        raise RecipeError(
            f"--processes {processes}: a launcher has started {world} processes already; leave"
            " `--processes` out"
        )
    return True


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `kdkit ARGUMENTS` in `processes` processes that train together; return the exit code
    after all have ended.

    If one fails, the others are terminated. A process reports its own errors; a death by a signal
    is reported here.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch reports a failure in a page of text; the processes print their own line
    logging.disable(logging.CRITICAL)
    # divide the cores: otherwise every process would use all of them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            max_restarts=0,
            monitor_interval=0.1,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            # -P: `-m` alone imports from the current folder first, such as a checkout's `kdkit`
            elastic_launch(config, sys.executable)("-P", "-m", "kdkit", *arguments)
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            says, code = first_failure(
                {rank: (end.pid, end.exitcode) for rank, end in error.failures.items()}, processes
            )
            print(says, end="", file=sys.stderr)
            return code
    return 0


def first_failure(failures: Mapping[int, tuple[int, int]], processes: int) -> tuple[str, int]:
    """Describe the process that failed before the others, and return its exit code in the form of a
    shell.

    Args:
        failures: by the process's number: its pid and exit code, which is below 0 for a signal.
        processes: the number of processes.
    """
    # a process that ended by itself comes before those that followed it, a signal before an exit
    # code: whoever lost a killed process reports an error of its own
    rank = min(failures, key=lambda rank: (failures[rank][1] in FOLLOWING, failures[rank][1] >= 0))
    pid, code = failures[rank]
    if code >= 0:
        return "", code
    named = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    says = (
        f"process {rank + 1} of {processes} (rank {rank}, pid {pid}) was killed by {named}; the"
        f" others were ended; {GOES_ON}\n"
    )
    return says, 128 - code


def worker_ended() -> str:
    """Return the message for a loader worker that has died, and keep torch's signal handler from
    raising for this worker again whenever another child ends.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return WORKER_ENDED


def told_of_another(error: BaseException) -> str | None:
    """Return the message for an error that only says that another process has ended, else None."""
    if not isinstance(error, RuntimeError):
        return None
    rank, world = of_launch()
    if "DataLoader worker (pid" in str(error):
        return worker_ended()
    if world > 1 and any(sign in str(error) for sign in LOST):
        return (
            f"process {rank + 1} of {world} (rank {rank}): another process has ended, so this one"
            f" ends too; {GOES_ON}"
        )
    return None
