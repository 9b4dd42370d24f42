"""How often the host waits for the device.

On CUDA torch itself notes it. On a CPU, which waits for nobody, the operations are counted whose result the host has to
see, and the tensors that travel to it without one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "aten::_local_scalar_dense",  # .item(), bool(), int()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
}


class _Watch(TorchDispatchMode):
    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITS or by_mask:
            self.places.append(name)
        return func(*args, **(kwargs or {}))


def _noted(method: Any, name: str, places: list[str]) -> Any:
    def noted(self: Tensor, *args: Any) -> Any:
        places.append(name)
        return method(self, *args)

    return noted


@contextmanager
def noting_waits(device: torch.device) -> Iterator[list[str]]:
    """Fills the list with what the host waited for, at the latest when it is left."""
    places: list[str] = []
    if device.type == "cpu":
        with pytest.MonkeyPatch.context() as patch, _Watch(places):
            for name in ("tolist", "cpu", "numpy"):
                patch.setattr(Tensor, name, _noted(getattr(Tensor, name), name, places))
            yield places
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places += [f"{x.filename}:{x.lineno}" for x in caught if "called a synchronizing" in str(x.message)]
