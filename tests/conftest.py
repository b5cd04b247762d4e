import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors of tests are small: threads would only wait for each other."""
    torch.set_num_threads(1)
