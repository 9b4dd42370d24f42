"""Cheap guesses at the update that a part of a layer gives a token; their parameter names contain `prior`."""

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from .routing import mean_square


class ZeroLinear(nn.Linear):
    """Starts at zero. A class of its own, because models are initialized module by module."""


def normalized(x: Tensor, eps: float) -> Tensor:
    """The normalized state n = x / RMS(x), float32 [..., D]: what guesses and predicted costs are linear in."""
    return x.float() * torch.rsqrt(mean_square(x, keepdim=True) + eps)


class PriorFFN(nn.Module):
    """W_out(silu(W_gate n) · W_up n), n = x / RMS(x): a cheap guess at the update that a block gives a token (3.1–3.3).

    Width ⌈D·f⌉ rounded up to an even number, at least 2; no biases. W_gate and W_up are the halves of one matrix, and
    n has no weight of its own, which would only scale the columns of that matrix: in decoding a small operation costs
    as much as a small matrix.

    In a decision layer prior = x + guess.
    """

    def __init__(self, config: Any, factor: float, dropout: float = 0.0, out: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        width = ceil(config.hidden_size * factor)
        width = max(2, width + width % 2)
        self.eps = config.rms_norm_eps
        self.w_in = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.w_out = out(width, config.hidden_size, bias=False)
        self.dropout = dropout

    def forward(self, original: Tensor) -> Tensor:
        """[B, T, D] → guess, [B, T, D]."""
        # 1 / RMS(x), a number for each token, goes behind the matrix: the normalized states are never formed.
        square = mean_square(original, keepdim=True)
        scale = torch.rsqrt(square + self.eps)
        projected = self.w_in(original)
        gate, up = (projected * scale.to(projected.dtype)).chunk(2, dim=-1)
        change = self.w_out(nn.functional.silu(gate) * up)
        if self.training and self.dropout:
            change = nn.functional.dropout(change, self.dropout)
        return change


class Forecast(nn.Module):
    """f(x) = W n + PriorFFN(x), n = x / RMS(x): what tokens that skip take, x + f(x), in the place of x + Δ(x).

    Most of what a layer adds is linear in the token, and a linear guess can be fitted at once (`fitting`). The network
    is there only with `forecast_factor` above 0. All of it starts at zero: conversion changes nothing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.linear = ZeroLinear(config.hidden_size, config.hidden_size, bias=False)
        self.network = PriorFFN(config, config.forecast_factor, out=ZeroLinear) if config.forecast_factor else None

    def forward(self, original: Tensor) -> Tensor:
        """[B, T, D] → guess, [B, T, D]."""
        guess = self.linear(original)
        guess = guess * torch.rsqrt(mean_square(original, keepdim=True) + self.eps).to(guess.dtype)
        return guess if self.network is None else guess + self.network(original)
