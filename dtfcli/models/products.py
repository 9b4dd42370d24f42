"""Float32 matrix products of the few rows that routing leaves, on a CPU.

torch gives float32 products on a CPU to MKL, whose speed falls with the number of rows, and bfloat16 ones to oneDNN.
What a routed layer gathers from a short prompt is few rows, and so is the one position whose logits are read: they go
to oneDNN as well.
"""

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

FEW_ROWS = 256
"""Above so many, MKL is near its best."""

_ONE_DNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _OneDNN(TorchFunctionMode):
    """`linear` of float32 tensors by oneDNN; everything else as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _wanted() and all(map(_is_plain, args[:2])) and args[1].dim() == 2:
            bias = args[2] if len(args) > 2 else None
            return _ONE_DNN(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_plain(x: Tensor) -> bool:
    """Whether this is float32 in memory, not a part of something distributed or quantized."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
    )


def _wanted() -> bool:
    """Whether this is eager inference in the tensors' own precision; hooks may change that inside a block."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def products_of_few_rows(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which the matrix products of gathered tokens [R, K, D] take the faster way, where there is one.

    There is none in compiled code, where a gradient or autocast is wanted, or R · K is above `FEW_ROWS`. Products agree
    with torch's own up to the order of their sums. `torch.backends.mkldnn.enabled = False` leaves all of them to MKL.
    """
    if (
        _ONE_DNN is None
        or not _wanted()
        or x.shape[:-1].numel() > FEW_ROWS
        or not _is_plain(x)
        or not torch.backends.mkldnn.enabled
    ):
        return nullcontext()
    return _OneDNN()


if _ONE_DNN is not None and _ONE_DNN not in flop_registry:  # a saved model brings a copy of this file

    @register_flop_formula(_ONE_DNN)
    def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """So that torch's FLOP counter sees these products, too."""
        return 2 * prod(x_shape) * int(weight_shape[0])
