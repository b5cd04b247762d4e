import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors of tests are small: threads would only wait for each other."""
    torch.set_num_threads(1)


def pytest_collection_finish():
    """Set aside what is in memory by now: Accelerate collects garbage after every stage, and would look at all of it each time."""
    gc.collect()
    gc.freeze()
