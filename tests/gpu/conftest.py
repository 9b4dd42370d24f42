"""The device of the tests that need a GPU.

They run on CUDA alone. With DTF_REHEARSE_GPU=1 they run on a CPU, too: what only a GPU has is then left out, so that a
lent one is not lost to a typing error.
"""

import os

import pytest
import torch

from tests import near

REHEARSED = os.environ.get("DTF_REHEARSE_GPU") == "1"  # read now: what is no setting is taken out of tests' environment


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA, or in a rehearsal the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not REHEARSED:
        pytest.skip("torch finds no CUDA device here; DTF_REHEARSE_GPU=1 tries these tests on the CPU")
    return torch.device("cpu")


@pytest.fixture
def on_gpu(device: torch.device) -> None:
    """For tests of what a CPU does not have."""
    if device.type == "cpu":
        pytest.skip("only a GPU has it")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 in float32; one thread, for the models are small; two devices part sooner than one does."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(near, "NEAR", 1e-4)
