"""Surprise: the thesis's score of a token, observed by the decision layer below a routed one.

The layer below is dense. A small network, the prior, predicts what it adds to a token; how much it really adds, and how
far that is from the prediction, are the two surprises that the router makes its score of.

Equation numbers (3.x) are those of the MSc thesis "Dynamic Transformers" (Wieser, UCL 2025). `routing_naive` holds the
same as loops over tokens, which is what the tests compare with.

Shape suffixes as in `routing`: B rows, T tokens of a row, D hidden size, W tokens of a window. All surprise arithmetic
is float32.
"""

from math import ceil, exp, log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import RoutingContext
from .router import Router
from .routing import Scores, mean_square


class PriorFFN(nn.Module):
    """W_out(silu(W_gate n) · W_up n), n = x / RMS(x): a cheap guess at the update that a block gives a token (3.1–3.3).

    Width ⌈D·f⌉ rounded up to an even number, at least 2; no biases. W_gate and W_up are the halves of one matrix, and
    n has no weight of its own, which would only scale the columns of that matrix: in decoding a small operation costs
    as much as a small matrix.

    In a decision layer prior = x + guess.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = ceil(config.hidden_size * config.prior_factor)
        width = max(2, width + width % 2)
        self.eps = config.norm_eps
        self.w_in = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.w_out = nn.Linear(width, config.hidden_size, bias=False)
        self.dropout = config.prior_dropout

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


class Surprise(NamedTuple):
    """What a decision layer says about each token; float32 [B, T] each but the first."""

    posterior: Tensor
    """[B, T, D], as it was given."""
    static: Tensor
    """D_st = ‖posterior − original‖² / D (3.6): how much the decision layer changed the token."""
    change: Tensor
    """D_ch = ‖posterior − prior‖² / D (3.7): how far the cheap prediction of that change was off."""
    prior_error: Tensor
    """‖prior − stop_grad(posterior)‖² / D (3.4): the value of D_ch, but no gradient reaches the posterior."""


def surprise(original: Tensor, posterior: Tensor, guess: Tensor, through_original: bool = True) -> Surprise:
    """Static surprise, change surprise and prior error of each token; the prior is original + guess (3.1).

    Args:
        original, posterior, guess: [B, T, D], any float dtype.
        through_original: whether gradients of the prior reach `original`, or stop at the guess.
    """
    x, y = original.float(), posterior.float()
    prior = (x if through_original else x.detach()) + guess
    return Surprise(posterior, mean_square(y - x), mean_square(y - prior), mean_square(y.detach() - prior))


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


def surprise_scores(static: Tensor, change: Tensor, average: Tensor, of: Scalars) -> Scores:
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


def recent_of(context: RoutingContext) -> Recent | slice:
    """The tokens that the moving average of each new token covers: no padding, and no sinks where it skips them."""
    config, (rows, tokens), past = context.config, context.shape, context.past
    counted, window = context.padding_mask, config.ma_window
    if counted is None:
        skipped = config.sink_tokens if config.skips_sinks_in_average else 0
        if tokens == 1 and past >= skipped:  # decoding: a run of positions
            return slice(max(skipped, past + 1 - window), past + 1)
        counted = torch.ones(rows, past + tokens, dtype=torch.bool, device=context.device)
    if config.skips_sinks_in_average and context.all_sinks is not None:
        counted = counted & ~context.all_sinks
    return recent_tokens(counted, window, past)


class SurpriseRouter(Router):
    """Gates by expected and unexpected change (3.8–3.12), with four learnable scalars: the thesis's Predictive Router.

    o_ce and m_cu are stored as logarithms: they must stay positive (ln of a negative o_ce is a NaN).
    """

    log_o_ce: nn.Parameter
    log_m_cu: nn.Parameter
    beta_ce: nn.Parameter
    beta_cu: nn.Parameter

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.initial = {
            "log_o_ce": log(config.o_ce_init),
            "log_m_cu": log(config.m_cu_init),
            "beta_ce": config.beta_ce_init,
            "beta_cu": config.beta_cu_init,
        }
        for name in self.initial:
            self.register_parameter(name, nn.Parameter(torch.empty(1, dtype=torch.float32)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in self.initial.items():
            getattr(self, name).fill_(value)

    def prepare(self, context: RoutingContext) -> None:
        context.shared["recent"] = recent_of(context)

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any) -> Scores:
        """D_st and D_ch of the new tokens are `below`; the cache keeps D_st of the row up to them."""
        static, change = below
        history = static if store is None else store.extend_surprise(static)
        of = Scalars(self.log_o_ce.exp(), self.log_m_cu.exp(), self.beta_ce, self.beta_cu)
        return surprise_scores(static, change, moving_average(history, context.shared["recent"]), of)

    def scalars(self) -> dict[str, float]:
        return {
            "o_ce": exp(self.log_o_ce.item()),
            "m_cu": exp(self.log_m_cu.item()),
            "beta_ce": self.beta_ce.item(),
            "beta_cu": self.beta_cu.item(),
        }
