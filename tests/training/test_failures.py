"""Memory that runs out is explained, wherever and however it does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.training.failures import OutOfMemory, explained_failures
from tests.training.small_runs import small_settings


def too_large() -> None:
    """More than any machine has, in torch's own words."""
    torch.empty(2**50, dtype=torch.float32)


def on_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [too_large, on_cuda, in_python])
@pytest.mark.parametrize("tight", [False, True])
def test_out_of_memory_suggests_remedies(tmp_path: Path, fail: Any, tight: bool) -> None:
    """Those alone that the settings do not have already."""
    settings = small_settings(
        tmp_path, training={"micro_batch_size": 1, "gradient_checkpointing": True} if tight else {}
    )
    with pytest.raises(OutOfMemory) as caught, explained_failures(settings):
        fail()
    message = str(caught.value)
    for remedy in ("training.micro_batch_size=1 (it was 2)", "training.gradient_checkpointing=true"):
        assert (remedy in message) != tight
    assert "lora.enabled" in message
    assert "data.seq_len=16 (it was 32)" in message
    assert len(message.splitlines()) == caught.value.exit_code == 1


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_failures(small_settings(tmp_path)):
        raise RuntimeError("shapes do not match")
