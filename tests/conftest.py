"""What every test starts from: the same random numbers, torch's own thread count, torch as the fallback."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    from fastnn import _fallback

    torch.manual_seed(0)
    threads, mode = torch.get_num_threads(), _fallback.get_fallback()
    yield
    torch.set_num_threads(threads)
    _fallback.set_fallback(mode)


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)  # for tests of tiny things
