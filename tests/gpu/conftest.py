"""The device of the tests that need a GPU: CUDA, or in a rehearsal (DTF_REHEARSE_GPU=1) the CPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.cases import exact, gpu


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """CUDA in exact float32, or in a rehearsal the CPU."""
    with exact():
        yield gpu()


@pytest.fixture
def on_gpu(device: torch.device) -> None:
    """For tests of what a CPU does not have."""
    if device.type == "cpu":
        pytest.skip("only a GPU has it")
