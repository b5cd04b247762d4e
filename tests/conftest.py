import gc
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors of tests are small: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def loaded_modules_stay():
    """Set what is loaded aside: Accelerate collects garbage after every stage, and would look at all of it each time."""
    yield
    if len(sys.modules) > loaded[-1] + 20:
        loaded.append(len(sys.modules))
        gc.collect()
        gc.freeze()


loaded = [0]
"""How many modules there were when they were last set aside."""
