"""One thread: small runs beside other processes are slowed by waiting threads, and bits should not depend on them."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
