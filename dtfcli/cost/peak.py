"""How fast this machine multiplies matrices: what `mfu` is measured against."""

import time

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a square matrix product here, the best of a few; None where the device has no such product."""
    size, repeats = (1024, 5) if device.type == "cpu" else (8192, 10)
    try:
        left = torch.ones(size, size, device=device, dtype=dtype)
        best = 0.0
        for _ in range(repeats):
            synchronize(device)
            began = time.perf_counter()
            left @ left
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    except RuntimeError:
        return None
    return best


def synchronize(device: torch.device) -> None:
    """Return when the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
