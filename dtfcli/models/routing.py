"""What routing computes: pure functions on tensors, each next to its equation.

Equation numbers (3.x) are those of the MSc thesis "Dynamic Transformers" (Wieser, UCL 2025); Mixture-of-Depths is
arXiv 2404.02258. `routing_naive` holds the same as loops over tokens, which is what the tests compare with.

The idea, for one routed layer: every token has a score that depends on nothing after it. The tokens with the highest
scores (`topk`, while training) or with a score above a calibrated threshold (`threshold`, causal) are gathered, pass
through the backbone's own block among themselves, and are scattered back; the others stay as they are.

Shape suffixes: B rows, T tokens of a row, K slots for routed tokens, D hidden size. All surprise arithmetic is float32.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """A router's opinion of each token; float32 [B, T] each."""

    score: Tensor
    """What is ranked and compared with thresholds; strictly increasing in the gate."""
    gate: Tensor
    """G (DTF) or σ(r), or r itself (MoD): scales the residual update."""
    s_ce: Tensor | None = None
    s_cu: Tensor | None = None
    """The two criteria after their sigmoids (DTF)."""


class Surprise(NamedTuple):
    """What a decision layer says about each token; float32 [B, T] each but the first."""

    posterior: Tensor
    """[B, T, D], as it was given: passed on in its stead, it has one gradient instead of two that are added."""
    static: Tensor
    """D_st = ‖posterior − original‖² / D (3.6): how much the decision layer changed the token."""
    change: Tensor
    """D_ch = ‖posterior − prior‖² / D (3.7): how far the cheap prediction of that change was off."""
    prior_error: Tensor
    """‖prior − stop_grad(posterior)‖² / D (3.4): the value of D_ch, but no gradient reaches the posterior."""


_SLICE_ELEMENTS = 2**16
"""Hidden states whose surprise a CPU computes at once: 256 KiB in float32, so that all steps stay in its cache."""


class _Surprise(torch.autograd.Function):
    """All in one pass over the tokens; the prior itself is never formed, nor anything saved.

    As separate expressions they cost eight float32 copies of the hidden states, and four more sums on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, original: Tensor, posterior: Tensor, guess: Tensor, through_original: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(original, posterior, guess)
        ctx.through_original = through_original
        static, change = _static_and_change(original, posterior, guess)
        return posterior.view_as(posterior), static, change, change.clone()

    @staticmethod
    def backward(ctx: Any, grad_posterior: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        results = [torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, needed, strict=True)]
        to_original, to_posterior, to_guess = (None if x is None else _tokens(x) for x in results)
        original, posterior, guess = map(_tokens, inputs)
        static, change, error = (grad.reshape(-1, 1) * (2 / original.shape[-1]) for grad in grads)
        for at in _slices(inputs[0]):
            step = _difference(posterior[at], original[at])
            miss = step - guess[at]
            step.mul_(static[at])
            if to_posterior is not None:
                to_posterior[at] = torch.addcmul(step, miss, change[at]).add_(_tokens(grad_posterior)[at])
            miss.mul_(-(change[at] + error[at]))
            if to_guess is not None:
                to_guess[at] = miss
            if to_original is not None:
                to_original[at] = miss.sub_(step) if ctx.through_original else step.neg_()
        return *results, None


def _static_and_change(original: Tensor, posterior: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """D_st (3.6) and D_ch (3.7), float32 [B, T] each, a slice of the tokens at a time."""
    static, change = (original.new_empty(original.shape[:-1], dtype=torch.float32) for _ in range(2))
    for at in _slices(original):
        step = _difference(_tokens(posterior)[at], _tokens(original)[at])
        static.view(-1)[at] = mean_square(step)
        change.view(-1)[at] = mean_square(step.sub_(_tokens(guess)[at]))
    return static, change


def _tokens(x: Tensor) -> Tensor:
    """[B, T, D] → [B · T, D]."""
    return x.flatten(0, -2)


def _slices(x: Tensor) -> list[slice]:
    """Slices of the tokens of [B, T, D]: all at once, or on a CPU as many as its cache holds."""
    tokens, size = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, tokens)]
    few = max(1, _SLICE_ELEMENTS // size)
    return [slice(start, start + few) for start in range(0, tokens, few)]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """The difference a − b in float32, without copies where one of them is float32 already."""
    return a - b if torch.float32 in (a.dtype, b.dtype) else a.float() - b


def mean_square(x: Tensor, keepdim: bool = False) -> Tensor:
    """Mean of x² over the last dimension, in float32."""
    return x.float().square().mean(-1, keepdim=keepdim)


def surprise(original: Tensor, posterior: Tensor, guess: Tensor, through_original: bool = True) -> Surprise:
    """Static surprise, change surprise and prior error of each token; the prior is original + guess (3.1).

    Args:
        original, posterior, guess: [B, T, D], any float dtype.
        through_original: whether gradients of the prior reach `original`, or stop at the guess.
    """
    if torch.is_grad_enabled():
        return Surprise(*_Surprise.apply(original, posterior, guess, through_original))
    static, change = _static_and_change(original, posterior, guess)
    # A tensor of its own: reentrant checkpointing runs this first, and one object twice would have one gradient.
    return Surprise(posterior, static, change, change.view_as(change))


class Recent(NamedTuple):
    """Which earlier tokens the moving average of each new token runs over; the same for all layers of a pass."""

    position: Tensor
    """int64 [B, T, W], newest first; where fewer than W tokens count so far, the rest repeat the oldest."""
    weight: Tensor
    """float32 [B, T, W], one over their number; 0 for repeats."""


def recent_tokens(counted: Tensor, window: int, past: int = 0) -> Recent:
    """The last `window` counted tokens at or before each new token.

    Args:
        counted: bool [B, S + T]; padding (and sinks, if they are left out) are False.
        window: length in counted tokens.
        past: S, how many of the positions came in earlier passes.
    """
    rows, tokens = counted.shape
    window = min(window, tokens)
    seen_BT = counted.long().cumsum(1)
    positions_BT = torch.arange(tokens, device=counted.device).expand(rows, tokens)
    # The position of the n-th counted token; what does not count goes to a place that is never read.
    place_BT = torch.where(counted, seen_BT - 1, tokens)
    nth_BT = positions_BT.new_zeros(rows, tokens + 1).scatter(1, place_BT, positions_BT)
    rank_BTW = seen_BT[:, past:, None] - 1 - torch.arange(window, device=counted.device)
    exists_BTW = rank_BTW >= 0
    position_BTW = nth_BT.gather(1, rank_BTW.clamp(min=0).flatten(1)).view_as(rank_BTW)
    return Recent(position_BTW, exists_BTW / exists_BTW.sum(-1, keepdim=True).clamp(min=1))


def moving_average(values: Tensor, recent: Recent | slice) -> Tensor:
    """MA in (3.9): the mean of the last counted values at or before each new token, without gradient.

    Each window is summed afresh. A difference of running sums would lose the small values that follow the massive
    first one (position 0 of a pretrained model).

    Args:
        values: float32 [B, S + T], of the cached positions and the new ones.
        recent: from `recent_tokens`; for a single new token without padding, the run of positions.

    Returns:
        float32 [B, T]; 0 where nothing has been counted yet.
    """
    if isinstance(recent, slice):
        return values.detach()[:, recent].mean(1, keepdim=True)
    windows_BTW = values.detach().gather(1, recent.position.flatten(1)).view_as(recent.position)
    return torch.linalg.vecdot(windows_BTW, recent.weight)


class Scalars(NamedTuple):
    """The four learnable scalars of a layer's router; float32 [1], o_ce and m_cu positive."""

    o_ce: Tensor
    """Offset of the expected change (3.8)."""
    m_cu: Tensor
    """Multiplier of the moving average (3.9)."""
    beta_ce: Tensor
    """Sharpness of S_CE, before softplus (3.10)."""
    beta_cu: Tensor
    """Sharpness of S_CU, before softplus (3.11)."""


def dtf_scores(static: Tensor, change: Tensor, average: Tensor, of: Scalars) -> Scores:
    """Surprise → gate, token by token.

    CE = D_st − (D_ch − ln(o_ce + 1e-10)) (3.8): the change that the prior saw coming.
    CU = D_st − m_cu · MA(D_st) (3.9): change out of proportion to the recent past.
    S = σ(softplus(β) · C) for each (3.10, 3.11); G = S_CE + S_CU − S_CE · S_CU (3.12), their probabilistic "or".
    G saturates in float32, so the ranked score is −ln(1 − G) = softplus(a) + softplus(b), where a and b are the
    arguments of the two sigmoids: the same order without ties.

    Args:
        static, change, average: D_st, D_ch, MA(D_st); float32 [B, T].
        of: the layer's scalars.
    """
    expected = static - (change - torch.log(of.o_ce + 1e-10))
    unexpected = static - of.m_cu * average
    a, b = F.softplus(of.beta_ce) * expected, F.softplus(of.beta_cu) * unexpected
    s_ce, s_cu = torch.sigmoid(a), torch.sigmoid(b)
    return Scores(F.softplus(a) + F.softplus(b), s_ce + s_cu - s_ce * s_cu, s_ce, s_cu)


def mod_scores(hidden_states: Tensor, weight: Tensor, kind: str = "sigmoid") -> Scores:
    """Mixture-of-Depths: r = x · w, a linear score of the token alone; gate σ(r), or r itself ("raw").

    Args:
        hidden_states: [B, T, D].
        weight: float32 [D].
        kind: of gate, "sigmoid" or "raw".
    """
    score = hidden_states.float() @ weight
    return Scores(score, score if kind == "raw" else torch.sigmoid(score))


def sink_mask(real: Tensor | None, sinks: int, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The first `sinks` real tokens of each row, wherever padding puts them; bool [B, T], None without sinks."""
    if sinks == 0:
        return None
    if real is None:
        return (torch.arange(shape[1], device=device) < sinks).expand(shape)
    return real & (real.long().cumsum(1) <= sinks)


@lru_cache(maxsize=32)
def _capacity_table(capacity: float, tokens: int, device: torch.device) -> Tensor:
    """K for every row length 0 … T, in Python's float64: a float32 floor differs for hundreds of pairs."""
    return torch.tensor([topk_capacity(capacity, length) for length in range(tokens + 1)], device=device)


def topk_capacity(capacity: float, length: int) -> int:
    """K = max(1, ⌊γ · L⌋) routed tokens for a row of L real ones; 0 at γ = 0 and for a row of padding alone."""
    return max(1, int(capacity * length)) if length and capacity else 0


def select_topk(scores: Tensor, capacity: float, real: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """The training rule (3.13): exactly K tokens of each row, the sinks first, then by score. Not causal.

    Args:
        scores: float32 [B, T].
        capacity: γ.
        real: bool [B, T], False for padding; None: all real.
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
    if real is not None:
        ranked = ranked.masked_fill(~real, -torch.inf)
    best_BK = ranked.topk(topk_capacity(capacity, tokens), dim=1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if real is None:
        return chosen.scatter(1, best_BK, True)
    allowed_B1 = _capacity_table(capacity, tokens, scores.device)[real.sum(1, keepdim=True)]
    return chosen.scatter(1, best_BK, torch.arange(best_BK.shape[1], device=scores.device) < allowed_B1)


def select_threshold(
    scores: Tensor, threshold: Tensor, real: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The causal rule: a token is routed when its score exceeds the layer's threshold, whatever comes later.

    Args:
        scores: float32 [B, T].
        threshold: float32, 0-d.
        real, sinks: as in `select_topk`.

    Returns:
        bool [B, T].
    """
    chosen = scores.detach() > threshold
    if sinks is not None:
        chosen = chosen | sinks
    return chosen if real is None else chosen & real


def share_threshold(scores: Tensor, capacity: float, real: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """The threshold that routes the share γ of the real tokens of these rows together, sinks counted in.

    The (1 − γ) quantile of the scores of real tokens that are not sinks, taken midway between two scores. Without
    host synchronization.

    Args:
        scores: float32 [B, T].
        capacity: γ in [0, 1].
        real, sinks: as in `select_topk`.

    Returns:
        float32, 0-d.
    """
    scores = scores.detach().flatten()
    free = torch.ones_like(scores, dtype=torch.bool) if real is None else real.flatten()
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
    """processed, with the gradient that gate · (processed − hidden_states) sends to the gate."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, processed: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, processed)
        return processed.view_as(processed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        hidden_states, processed = ctx.saved_tensors
        return None, grad, (processed - hidden_states).mul_(grad).sum(-1, dtype=torch.float32)


def gated_update(hidden_states: Tensor, processed: Tensor, gate: Tensor, kind: str) -> Tensor:
    """hidden_states + gate · (processed − hidden_states).

    "straight_through" has the value of gate 1 and the gradient of the soft gate. It starts from `processed`
    itself, because x + (block(x) − x) is not block(x) in floating point.

    Args:
        hidden_states, processed: x and block(x), [B, K, D].
        gate: float32 [B, K].
        kind: "soft" or "straight_through".
    """
    if kind == "straight_through":
        return _StraightThrough.apply(hidden_states, processed, gate) if gate.requires_grad else processed
    return hidden_states + gate.unsqueeze(-1).to(processed.dtype) * (processed - hidden_states)


def masked_mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean of [B, T] values over the counted tokens; 0 when there are none."""
    if counted is None:
        return values.mean()
    return (values * counted).sum() / counted.sum().clamp(min=1)
