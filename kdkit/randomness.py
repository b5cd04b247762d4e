"""Random numbers as a function of where training is, never of how it got there.

Every model draws its initial weights from (seed, its number), every optimizer step from (seed,
stage, step, rank). So resuming needs no random state, and a run gives the same numbers whatever
else runs beside it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derived(*parts: int | str) -> int:
    """A seed of 32 bits that depends on all the parts and their order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def reseed(*parts: int | str) -> None:
    """Seed torch (the CPU and every accelerator), numpy and random from the parts."""
    seed = derived(*parts)
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed asks for every backend there could be, at each step anew
    torch.default_generator.manual_seed(seed)
    if (accelerator := _accelerator()) is not None:
        accelerator.manual_seed_all(seed)


@functools.cache
def _accelerator() -> Any:
    """The module of the kind of accelerator that this machine has: torch.cuda or a relative of
    it.
    """
    return torch.get_device_module() if torch.accelerator.is_available() else None


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw from the parts inside, and leave the random state outside as it was."""
    python, numeric = random.getstate(), np.random.get_state()
    devices = [_accelerator().current_device()] if _accelerator() is not None else []
    with torch.random.fork_rng(devices):
        try:
            reseed(*parts)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)
