import collections
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
def what_is_loaded_stays(request):
    """Set it aside: Accelerate collects garbage after every stage, and would look at all of it each time."""
    yield
    now = request.module, len(sys.modules)
    if now != last[0]:
        last[0] = now
        gc.collect()
        gc.freeze()


last = [None]
"""The module, and how many were loaded, when garbage was last collected."""


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """Mark all but the first cases of a test that has the mark `first` as slow."""
    seen = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("first"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)
