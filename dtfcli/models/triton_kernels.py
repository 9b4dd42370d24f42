"""The Triton kernel of the static cache and its naive twin: where no row enters a layer, no weights are read.

Notable choices:

    counted     How many rows entered a routed layer is a number on the device, and the kernels look at it there: the
                host never waits, shapes never change, a CUDA graph captures them. At 0 no weight is read.
    one pass    Decoding takes as long as reading the weights. Each is read once: a row of them at a time for one
                token, for more tokens by matrix units.
    no tuning   Block sizes follow from shapes alone. Launch each shape once before capturing it: that compiles it.
    float32     All sums. Products of float32 are exact (no tf32).

Nothing here is used unless asked for (`use_triton_kernels`): no GPU has yet shown that it pays. Without Triton this
file still imports, and `available` says no. The interpreter (TRITON_INTERPRET=1, set before Triton is first imported)
runs the kernels on a CPU, for tests.

Shape suffixes: M rows of hidden states, K their size, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # inside `try`, or Transformers would demand it from whoever loads an uploaded model
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jitted(function: Callable[..., None]) -> Any:
    """The kernel of a function; without Triton the function itself, which nobody calls."""
    return function if triton is None else triton.jit(function)


_INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)
"""Whether kernels run in the interpreter: Triton's own functions became what they are when it was imported."""


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on this tensor: Triton is there, and a GPU or the interpreter."""
    return triton is not None and (tensor.is_cuda or _INTERPRETED)


def counted_linear_naive(x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor) -> Tensor:
    """The equation of `counted_linear`: y = x Wᵀ + b for the first `count` rows, 0 for the others."""
    y_MN = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    entered_M = torch.arange(len(x), device=x.device) < count
    return torch.where(entered_M.unsqueeze(1), y_MN, 0.0).to(x.dtype)


def counted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor) -> Tensor:
    """Linear map of the first `count` rows, y = x Wᵀ + b; 0 for the others; without gradient.

    Rows from `count` on are not read, and where a block of rows has none before it, nor are the weights. Twin:
    `counted_linear_naive`.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, like the matrices.
        weight: [N, K], of x's dtype.
        bias: [N], contiguous, of x's dtype; or None.
        count: int32, 0-d or [1], on x's device.

    Returns:
        [M, N], contiguous, of x's dtype; summed in float32, rounded once.
    """
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    assert available(x)
    assert count.dtype == torch.int32
    assert count.numel() == 1
    assert {(tensor.dtype, tensor.device) for tensor in given} == {(x.dtype, count.device)}
    assert weight.shape[1] == x.shape[1]
    assert bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    assert not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)), "there is no backward"
    (rows, size), width = x.shape, weight.shape[0]
    y = x.new_empty(rows, width)
    if y.numel() == 0:
        return y
    strides = (*x.stride(), *weight.stride())
    # Launches go to the current device. torch has a context for it, too, which `torch.compile` cannot trace.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if rows == 1:
            vector = _vector_blocks(width, size)
            grid: tuple[int, ...] = (ceil(width / vector["BLOCK_N"]),)
            _vector_kernel[grid](x, weight, bias, count, y, width, size, *strides[1:], **vector)
        else:
            matrix = _matrix_blocks(rows, width, size, x.element_size())
            # Blocks of rows side by side: they read the same weights at about the same time.
            grid = (ceil(rows / matrix["BLOCK_M"]), ceil(width / matrix["BLOCK_N"]))
            _matrix_kernel[grid](x, weight, bias, count, y, rows, width, size, *strides, _INTERPRETED, **matrix)
    return y


def _power_of_2(least: int) -> int:
    """The next power of 2, as `torch.compile` can trace it, unlike Triton's."""
    return 1 << (least - 1).bit_length()


def _vector_blocks(width: int, size: int) -> dict[str, int]:
    """Block sizes for one row of states: enough programs for 132 multiprocessors, 32 weights in flight a thread."""
    block_n = 4 if width < 4096 else 8
    block_k = min(1024, max(32, _power_of_2(size)))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": max(1, block_n * block_k // 1024)}


def _matrix_blocks(rows: int, width: int, size: int, itemsize: int) -> dict[str, int]:
    """Block sizes for several rows: 16 is the least that matrix units take; 3 stages stay below 128 KiB."""
    block_m = min(64, max(16, _power_of_2(rows)))
    block_n = 16 if width < 4096 else 32
    most = (512 if block_m == block_n == 16 else 256) // itemsize
    block_k = min(most, max(16, _power_of_2(size)))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}


@_jitted
def _vector_kernel(
    x,
    weight,
    bias,
    count,
    y,
    N,
    K,
    x_k,
    w_n,
    w_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of one row: sums stay apart in BLOCK_K columns until the end. Strides are named for whose."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    if tl.load(count) < 1:
        tl.store(y + n_N, tl.zeros([BLOCK_N], y.dtype.element_ty), mask=n_N < N)
        return
    sum_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_NK = (n_N < N)[:, None] & (k_K < K)[None, :]
        x_K = tl.load(x + k_K * x_k, mask=k_K < K, other=0.0).to(tl.float32)
        at_NK = weight + n_N[:, None] * w_n + k_K[None, :] * w_k
        sum_NK += tl.load(at_NK, mask=inside_NK, other=0.0).to(tl.float32) * x_K[None, :]
    y_N = tl.sum(sum_NK, axis=1)
    if bias is not None:
        y_N += tl.load(bias + n_N, mask=n_N < N, other=0.0).to(tl.float32)
    tl.store(y + n_N, y_N.to(y.dtype.element_ty), mask=n_N < N)


@_jitted
def _matrix_kernel(
    x,
    weight,
    bias,
    count,
    y,
    M,
    N,
    K,
    x_m,
    x_k,
    w_n,
    w_k,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows. WIDEN: to float32 first, where `dot` takes no bfloat16 (the interpreter)."""
    first = tl.program_id(0) * BLOCK_M
    m_M = first + tl.arange(0, BLOCK_M).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    y_MN = y + m_M[:, None] * N + n_N[None, :]
    inside_MN = (m_M < M)[:, None] & (n_N < N)[None, :]
    entered = tl.minimum(tl.load(count), M)
    if first >= entered:
        tl.store(y_MN, tl.zeros([BLOCK_M, BLOCK_N], y.dtype.element_ty), mask=inside_MN)
        return
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_KN = (k_K < K)[:, None] & (n_N < N)[None, :]
        at_MK = x + m_M[:, None] * x_m + k_K[None, :] * x_k
        x_MK = tl.load(at_MK, mask=(m_M < entered)[:, None] & (k_K < K)[None, :], other=0.0)
        w_KN = tl.load(weight + k_K[:, None] * w_k + n_N[None, :] * w_n, mask=inside_KN, other=0.0)
        if WIDEN:
            x_MK, w_KN = x_MK.to(tl.float32), w_KN.to(tl.float32)
        sum_MN = tl.dot(x_MK, w_KN, sum_MN, input_precision="ieee")
    if bias is not None:
        sum_MN += tl.load(bias + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
    sum_MN = tl.where((m_M < entered)[:, None], sum_MN, 0.0)
    tl.store(y_MN, sum_MN.to(y.dtype.element_ty), mask=inside_MN)
