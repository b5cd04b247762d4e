"""Random numbers as a function of the position in training, independent of its history.

Every model draws its initial weights from (seed, its number), every optimizer step from (seed,
stage, step, rank). So resuming needs no random state, and a run gives the same numbers whatever
else runs beside it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def derived(*parts: int | str) -> int:
    """Derive a seed of 32 bits that depends on all the parts and their order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def reseed(*parts: int | str) -> None:
    """Seed torch (the CPU and every accelerator), numpy and random from the parts."""
    # 32 bits, the most that NumPy's global generator takes
    seed = derived(*parts)
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed checks every possible backend, which is slow at each step
    torch.default_generator.manual_seed(seed)
    if (accelerator := _accelerator()) is not None:
        accelerator.manual_seed_all(seed)


@functools.cache
def _accelerator() -> Any:
    """Return the module of this machine's kind of accelerator: torch.cuda or an equivalent."""
    return torch.get_device_module() if torch.accelerator.is_available() else None


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed from the parts inside the block, and restore the random state afterwards."""
    devices = [_accelerator().current_device()] if _accelerator() is not None else []
    with restored(devices):
        reseed(*parts)
        yield


@contextlib.contextmanager
def restored(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (the CPU, these devices) afterwards."""
    python, numeric = random.getstate(), np.random.get_state()
    # by default, fork_rng saves the state of every device, which is slow
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)
