"""Starts a command in several processes of this machine, and reports their failure in one line."""

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
"""Texts in torch's errors, of several backends, when a process waits for one that no longer
exists.
"""


def of_launch() -> tuple[int, int]:
    """Return this process's number, from 0, and the number of processes, as set by the launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Check whether this is the launch's first process, or was started alone."""
    return of_launch()[0] == 0


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

    logging.disable(logging.CRITICAL)  # torch reports a failure in a page of text
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
            elastic_launch(config, sys.executable)("-P", "-m", "kdkit", *arguments)
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            says, code = first_failure(
                {rank: (one.pid, one.exitcode) for rank, one in error.failures.items()}, processes
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
    rank = min(failures, key=lambda rank: (failures[rank][1] in FOLLOWING, failures[rank][1] >= 0))
    pid, code = failures[rank]
    if code >= 0:
        return "", code
    named = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
    says = (
        f"process {rank + 1} of {processes} (rank {rank}, pid {pid}) was killed by {named}; the"
        f" others were ended; {GOES_ON}\n"
    )
    return says, 128 - code


def told_of_another(error: BaseException) -> str | None:
    """Return the message that replaces an error which only states that another process has ended;
    None for other errors.
    """
    if not isinstance(error, RuntimeError):
        return None
    rank, world = of_launch()
    if "DataLoader worker (pid" in str(error):
        return WORKER_ENDED
    if world > 1 and any(sign in str(error) for sign in LOST):
        return (
            f"process {rank + 1} of {world} (rank {rank}): another process has ended, so this one"
            f" ends too; {GOES_ON}"
        )
    return None
