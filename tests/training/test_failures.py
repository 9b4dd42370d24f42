"""Memory that runs out is explained, wherever and however it does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.experiment import train
from dtfcli.runs.folder import list_checkpoints
from dtfcli.training.events import TrainEvent
from dtfcli.training.failures import OutOfMemory, explained_failures
from tests.training.small_runs import small_settings


def too_large() -> None:
    """More than any machine has: what the allocator says is torch's own."""
    torch.empty(2**50, dtype=torch.float32)


def cuda_says_so() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def python_says_so() -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [too_large, cuda_says_so, python_says_so])
def test_out_of_memory_suggests_what_helps(tmp_path: Path, fail: Any) -> None:
    with pytest.raises(OutOfMemory) as caught, explained_failures(small_settings(tmp_path)):
        fail()
    message = str(caught.value)
    for remedy in ("training.micro_batch_size=1 (it was 2)", "training.gradient_checkpointing=true", "lora.enabled"):
        assert remedy in message
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 1


def test_a_run_without_memory_keeps_its_checkpoints(tmp_path: Path) -> None:
    def listener(event: TrainEvent) -> None:
        if (event.kind, event.step) == ("step", 3):
            too_large()

    with pytest.raises(OutOfMemory):
        train(small_settings(tmp_path), on_event=listener)
    (run,) = (tmp_path / "outputs").glob("*/small")
    assert [path.name for path in list_checkpoints(run)] == ["step-000002"]


def test_only_what_is_not_so_already_is_suggested(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, training={"micro_batch_size": 1, "gradient_checkpointing": True})
    with pytest.raises(OutOfMemory) as caught, explained_failures(settings):
        too_large()
    assert "micro_batch_size" not in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_failures(small_settings(tmp_path)):
        raise RuntimeError("shapes do not match")
