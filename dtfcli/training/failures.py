"""Failures of the machine, explained in one or two lines: no memory, and processes that have ended."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dtfcli.errors import DTFError
from dtfcli.settings import Settings
from dtfcli.training.distributed import world_size

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_LOST = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "NCCL", "gloo")


class ProcessLost(DTFError):
    """Another process of the run has ended."""


class OutOfMemory(DTFError):
    """The model and its micro-batch do not fit."""


@contextmanager
def explained_failures(settings: Settings) -> Iterator[None]:
    """Explain which settings to change when memory runs out, and where the reason stands when a process has ended.

    Raises:
        OutOfMemory: of the device or of the machine.
        ProcessLost: a process of this run is gone.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in _NO_MEMORY):
            raise OutOfMemory(_out_of_memory(settings)) from error
        if world_size() > 1 and (isinstance(error, dist.DistError) or any(words in text for words in _LOST)):
            raise ProcessLost("Another process of this run has ended; its own message says why.") from error
        raise


def _out_of_memory(settings: Settings) -> str:
    """The remedies that the settings do not have already, the cheapest first."""
    training, remedies = settings.training, []
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        remedies.append(f"training.micro_batch_size={half} (it was {training.micro_batch_size})")
    if training.gradient_checkpointing is not True:
        remedies.append("training.gradient_checkpointing=true")
    if world_size() > 1 and training.sharding != "fsdp2":
        remedies.append("training.sharding=fsdp2")
    if not settings.lora.enabled:
        remedies.append("lora.enabled=true")
    remedies.append(f"data.seq_len={settings.data.seq_len // 2} (it was {settings.data.seq_len})")
    return (
        f"Out of memory. Start a new run with any of {', '.join(remedies)}. What was saved is intact: once more memory "
        "is free, dtf train --resume goes on from it."
    )
