"""Triton kernels beside their naive twins: what decoding and surprise cost on a GPU where small operations wait.

Notable choices:

    counted     How many rows entered a routed layer is a number on the device, and the kernels look at it there: the
                host never waits, shapes never change, a CUDA graph captures them. At 0 no weight is read.
    one pass    Decoding waits for weights. Each is read once: a row of them at a time for one token, for more tokens
                by matrix units. Surprise reads each hidden state once, and once more for its gradient.
    no tuning   Block sizes follow from shapes alone. Launch each shape once before capturing it: that compiles it.
    float32     All sums. Products of float32 are exact (no tf32).

Nothing here is used unless asked for (`use_triton_kernels`): no GPU has yet shown that it pays. Without Triton this
file still imports, and `available` says no. The interpreter (TRITON_INTERPRET=1, set before Triton is first imported)
runs the kernels on a CPU, for tests.

Shape suffixes: M rows of hidden states, K their size, N outputs; B rows, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .surprise import Surprise

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


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device. torch has the same, which `torch.compile` cannot trace."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    with _device_of(x):
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


def fused_surprise(original: Tensor, posterior: Tensor, guess: Tensor, through_original: bool = True) -> Surprise:
    """Static surprise, change surprise and prior error of each token, each state read once; the twin is `surprise`.

    D_st = ‖s‖² / D and D_ch = ‖s − guess‖² / D with s = posterior − original; the prior error is D_ch by value.

    Args:
        original, posterior, guess: [B, T, D], any float dtypes.
        through_original: whether gradients of the prior reach `original`, or stop at the guess.

    Returns:
        posterior as given; D_st, D_ch, prior error: float32 [B, T].
    """
    assert available(original)
    assert original.shape == posterior.shape == guess.shape
    return Surprise(*_FusedSurprise.apply(original, posterior, guess, through_original))


class _FusedSurprise(torch.autograd.Function):
    """With s as above, m = s − guess, and 2 / D times the gradients g_st, g_ch, g_er of the three results:

    posterior: g_st s + g_ch m + its own; guess: −(g_ch + g_er) m; original: −g_st s − (g_ch + g_er) m, or −g_st s.
    """

    @staticmethod
    def forward(
        ctx: Any, original: Tensor, posterior: Tensor, guess: Tensor, through_original: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(original, posterior, guess)
        ctx.through_original = through_original
        shape, size = original.shape[:-1], original.shape[-1]
        static, change, error = (original.new_empty(shape, dtype=torch.float32) for _ in range(3))
        states = [_rows(x) for x in (original, posterior, guess)]
        if static.numel():
            with _device_of(original):
                _surprise_kernel[(static.numel(),)](
                    *states, static, change, error, size, *(x.stride(0) for x in states), **_surprise_blocks(size)
                )
        return posterior.view_as(posterior), static, change, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        results = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
            for x, wanted in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        states = [_rows(x) for x in (*inputs, grads[0])]
        weights = [grad.contiguous() for grad in grads[1:]]
        tokens, size = states[0].shape
        if tokens:
            with _device_of(states[0]):
                _surprise_backward_kernel[(tokens,)](
                    *states,
                    *weights,
                    *results,
                    size,
                    *(x.stride(0) for x in states),
                    ctx.through_original,
                    **_surprise_blocks(size),
                )
        return *results, None


def _rows(x: Tensor) -> Tensor:
    """[B, T, D] → [B · T, D] whose rows lie in one piece each; a copy only where they do not yet."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _surprise_blocks(size: int) -> dict[str, int]:
    """One program a token, 8 elements a thread: in half precision 16 bytes, the widest access there is."""
    block = min(2048, max(32, _power_of_2(size)))
    return {"BLOCK_D": block, "num_warps": max(1, block // 256)}


@_jitted
def _surprise_kernel(
    original, posterior, guess, static, change, error, D, original_t, posterior_t, guess_t, BLOCK_D: tl.constexpr
):
    """D_st, D_ch and the prior error of one token."""
    token = tl.program_id(0).to(tl.int64)
    static_D = tl.zeros([BLOCK_D], tl.float32)
    change_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        before_D = tl.load(original + token * original_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        after_D = tl.load(posterior + token * posterior_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        guess_D = tl.load(guess + token * guess_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        step_D = after_D - before_D
        static_D += step_D * step_D
        change_D += (step_D - guess_D) * (step_D - guess_D)
    change_mean = tl.sum(change_D, axis=0) / D
    tl.store(static + token, tl.sum(static_D, axis=0) / D)
    tl.store(change + token, change_mean)
    tl.store(error + token, change_mean)


@_jitted
def _surprise_backward_kernel(
    original,
    posterior,
    guess,
    grad_posterior,
    grad_static,
    grad_change,
    grad_error,
    to_original,
    to_posterior,
    to_guess,
    D,
    original_t,
    posterior_t,
    guess_t,
    grad_posterior_t,
    THROUGH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of one token's states, those that are wanted: the others are None."""
    token = tl.program_id(0).to(tl.int64)
    static = tl.load(grad_static + token) * 2 / D
    change = tl.load(grad_change + token) * 2 / D
    error = tl.load(grad_error + token) * 2 / D
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        before_D = tl.load(original + token * original_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        after_D = tl.load(posterior + token * posterior_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        guess_D = tl.load(guess + token * guess_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        step_D = after_D - before_D
        miss_D = step_D - guess_D
        if to_posterior is not None:
            own_D = tl.load(grad_posterior + token * grad_posterior_t + d_D, mask=d_D < D, other=0.0).to(tl.float32)
            result_D = static * step_D + change * miss_D + own_D
            tl.store(to_posterior + token * D + d_D, result_D.to(to_posterior.dtype.element_ty), mask=d_D < D)
        if to_guess is not None:
            result_D = -(change + error) * miss_D
            tl.store(to_guess + token * D + d_D, result_D.to(to_guess.dtype.element_ty), mask=d_D < D)
        if to_original is not None:
            result_D = -static * step_D
            if THROUGH:
                result_D -= (change + error) * miss_D
            tl.store(to_original + token * D + d_D, result_D.to(to_original.dtype.element_ty), mask=d_D < D)
