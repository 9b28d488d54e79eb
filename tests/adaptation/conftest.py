"""What the tests of adapting run under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks gain nothing from a second thread, and lose time to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
