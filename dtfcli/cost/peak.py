"""What this machine can do and what a process takes: the peak of matrix products, and the most memory held."""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def matmul_peak(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float | None:
    """FLOP/s of a square matrix product here, the best of a few; None where the device has no such product.

    By `time.process_time` it is FLOPs for each second of a CPU's core.
    """
    size, repeats = (1024, 5) if device.type == "cpu" else (8192, 10)
    try:
        left = torch.ones(size, size, device=device, dtype=dtype)
        best = 0.0
        for _ in range(repeats):
            synchronize(device)
            began = clock()
            left @ left
            synchronize(device)
            best = max(best, 2 * size**3 / (clock() - began))
    except RuntimeError:
        return None
    return best


def synchronize(device: torch.device) -> None:
    """Return when the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_resident_peak() -> bool:
    """Give freed memory back, then let the kernel count the peak from here; False if it cannot (not Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return os.path.exists("/proc/self/status")


def resident(field: str) -> int:
    """A field of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
