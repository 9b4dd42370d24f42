"""What routing computes: pure functions on tensors, each next to its equation. Whole blocks route by them.

A routed MLP (`dtf convert`) takes the same idea and fewer steps, all in `modeling_routed_mlp`: it knows one token and
no positions, so it needs no top-K, no slots and no cache.

The idea, for one routed layer: every token has a score that depends on nothing after it. The tokens with the highest
scores (`topk`, while training) or with a score above a calibrated threshold (`threshold`, causal) are gathered, pass
through the backbone's own block among themselves, and are scattered back. The others skip it: they stay as they are,
or take what a linear map forecasts that the block would have added (`forecast`).

The score is what one way of choosing differs from another in, and each has a file: `cost` predicts what skipping would
lose, by a linear function of the token that is fitted to known updates. `mod` (Mixture-of-Depths, arXiv 2404.02258)
follows the language model's gradient. `surprise` (the thesis) measures what the layer below did.

`routing_naive` holds the same as loops over tokens, which is what the tests compare with. Shape suffixes: B rows, T
tokens of a row, K slots for routed tokens, D hidden size. Scores are float32.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .least_squares import TINY


class Scores(NamedTuple):
    """A router's opinion of each token; float32 [B, T] each."""

    score: Tensor
    """What is ranked and compared with thresholds; strictly increasing in the gate."""
    gate: Tensor
    """G (surprise) or σ(r), or r itself (MoD), or 1: scales the residual update."""
    s_ce: Tensor | None = None
    s_cu: Tensor | None = None
    """The two criteria after their sigmoids (`surprise`)."""


def mean_square(x: Tensor, keepdim: bool = False) -> Tensor:
    """Mean of x² over the last dimension, in float32."""
    return x.float().square().mean(-1, keepdim=keepdim)


def normalized(x: Tensor, eps: float) -> Tensor:
    """The normalized state n = x / RMS(x), float32 [..., D]: what forecasts and predicted costs are linear in."""
    return x.float() * torch.rsqrt(mean_square(x, keepdim=True) + eps)


def sink_mask(is_token: Tensor | None, sinks: int, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The first `sinks` real tokens of each row, wherever padding puts them; bool [B, T], None without sinks."""
    if sinks == 0:
        return None
    if is_token is None:
        return (torch.arange(shape[1], device=device) < sinks).expand(shape)
    return is_token & (is_token.long().cumsum(1) <= sinks)


@lru_cache(maxsize=32)
def _capacity_table(capacity: float, tokens: int, device: torch.device) -> Tensor:
    """K for every row length 0 … T, in Python's float64: a float32 floor differs for hundreds of pairs."""
    return torch.tensor([topk_capacity(capacity, length) for length in range(tokens + 1)], device=device)


def topk_capacity(capacity: float, length: int) -> int:
    """K = max(1, ⌊γ · L⌋) routed tokens for a row of L real ones; 0 at γ = 0 and for a row of padding alone."""
    return max(1, int(capacity * length)) if length and capacity else 0


def select_topk(scores: Tensor, capacity: float, is_token: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """The training rule (3.13): exactly K tokens of each row, the sinks first, then by score. Not causal.

    Args:
        scores: float32 [B, T].
        capacity: γ.
        is_token: bool [B, T], False for padding; None: all real.
        sinks: bool [B, T] from `sink_mask`.

    Returns:
        bool [B, T] with `topk_capacity` True entries in each row.
    """
    tokens = scores.shape[1]
    ranked = scores.detach()
    if sinks is not None:
        # Earlier sinks first, should there be more of them than K.
        first = torch.finfo(ranked.dtype).max / torch.arange(1, tokens + 1, device=scores.device)
        ranked = torch.where(sinks, first, ranked)
    if is_token is not None:
        ranked = ranked.masked_fill(~is_token, -torch.inf)
    best_BK = ranked.topk(topk_capacity(capacity, tokens), dim=1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if is_token is None:
        return chosen.scatter(1, best_BK, True)
    allowed_B1 = _capacity_table(capacity, tokens, scores.device)[is_token.sum(1, keepdim=True)]
    return chosen.scatter(1, best_BK, torch.arange(best_BK.shape[1], device=scores.device) < allowed_B1)


def select_threshold(
    scores: Tensor, threshold: Tensor, is_token: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The causal rule: a token is routed when its score exceeds the layer's threshold, whatever comes later.

    Args:
        scores: float32 [B, T].
        threshold: float32, 0-d.
        is_token, sinks: as in `select_topk`.

    Returns:
        bool [B, T].
    """
    chosen = scores.detach() > threshold
    if sinks is not None:
        chosen = chosen | sinks
    return chosen if is_token is None else chosen & is_token


def select_explored(
    noise: Tensor, selected: Tensor, count: int, is_token: Tensor | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Skipping tokens at random, whose update is looked at: without them only tokens that score high are learned from.

    Args:
        noise: uniform in [0, 1), [B, T].
        selected: bool [B, T], who enters.
        count: how many of each row, at most.
        is_token, sinks: as in `select_topk`.

    Returns:
        bool [B, T]; and float32 [B, 1], how many skipping tokens each of them stands for.
    """
    skipping = ~selected if is_token is None else ~selected & is_token
    if sinks is not None:
        skipping = skipping & ~sinks
    drawn = noise.masked_fill(~skipping, -1.0).topk(min(count, noise.shape[1]), dim=1).indices
    explored = torch.zeros_like(selected).scatter(1, drawn, True) & skipping
    return explored, skipping.sum(1, keepdim=True) / explored.sum(1, keepdim=True).clamp(min=1)


def share_threshold(
    scores: Tensor, capacity: float, is_token: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The threshold that routes the share γ of the real tokens of these rows together, sinks counted in.

    The (1 − γ) quantile of the scores of real tokens that are not sinks, taken midway between two scores. Without
    host synchronization.

    Args:
        scores: float32 [B, T], or [N] of several batches.
        capacity: γ in [0, 1].
        is_token, sinks: as in `select_topk`, in the shape of the scores.

    Returns:
        float32, 0-d.
    """
    scores = scores.detach().flatten()
    free = torch.ones_like(scores, dtype=torch.bool) if is_token is None else is_token.flatten()
    wanted = capacity * free.sum()
    if sinks is not None:
        sinks = sinks.flatten() & free
        wanted = wanted - sinks.sum()
        free = free & ~sinks
    ordered = scores.masked_fill(~free, -torch.inf).sort(descending=True).values
    last = (free.sum() - 1).clamp(min=0)
    count = wanted.round().long()
    bounds = torch.stack([count - 1, count]).clamp(min=0).clamp(max=last)
    return ordered[bounds].mean()


class _StraightThrough(torch.autograd.Function):
    """processed, with the gradient that gate · (processed − skipped) sends to the gate."""

    @staticmethod
    def forward(ctx: Any, skipped: Tensor, processed: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(skipped, processed)
        return processed.view_as(processed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        skipped, processed = ctx.saved_tensors
        return None, grad, (processed - skipped).mul_(grad).sum(-1, dtype=torch.float32)


def gated_update(skipped: Tensor, processed: Tensor, gate: Tensor, kind: str) -> Tensor:
    """The sum skipped + gate · (processed − skipped): from what a token is without the block to what it is with it.

    "straight_through" has the value of gate 1 and the gradient of the soft gate. It starts from `processed`
    itself, because x + (block(x) − x) is not block(x) in floating point.

    Args:
        skipped, processed: x (or x + f(x) with a forecast) and block(x), [B, K, D].
        gate: float32 [B, K].
        kind: "soft" or "straight_through".
    """
    if kind == "straight_through":
        return _StraightThrough.apply(skipped, processed, gate) if gate.requires_grad else processed
    return skipped + gate.unsqueeze(-1).to(processed.dtype) * (processed - skipped)


def masked_mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean of [B, T] values over the counted tokens, or weighted by float32 [B, T]; 0 when none counts."""
    if counted is None:
        return values.mean()
    total = counted.sum()
    return (values * counted).sum() / (total.clamp(min=1) if counted.dtype == torch.bool else total.clamp(min=TINY))
