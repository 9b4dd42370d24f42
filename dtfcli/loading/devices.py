"""Which device and which precision a name such as "auto" means on this machine."""

import ctypes
import os

import torch

from dtfcli.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of a name: auto (the best available), cpu, cuda, cuda:N, mps or xpu.

    Raises:
        ConfigError: this machine or this build of torch does not have it.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r}: choose auto, cpu, cuda, cuda:0 and so on, mps or xpu.") from error
    if device.type == "cpu":
        return device
    backend = getattr(torch, device.type, None)
    if backend is None or not backend.is_available():
        raise ConfigError(f"device = {name!r}: torch {torch.__version__} finds none here; use cpu or auto.")
    count = backend.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device = {name!r}: there are {count} of them, numbered from 0.")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; without, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return device.type == "xpu"


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision to compute in; "auto" is bfloat16 where the hardware has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return DTYPES[name]


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, -1  # of glibc's malloc.h and its manual


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, for those to come; whether it does (glibc alone knows how).

    Otherwise each large tensor on the CPU is a fresh mapping, and the kernel zeroes its pages one by one. For programs
    that compute the same shapes over and over. What `MALLOC_…` variables say counts more.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
