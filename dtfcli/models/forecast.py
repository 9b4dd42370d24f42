"""The forecast: what tokens that skip a routed layer take instead of its update, and what it learns from.

Most of what a layer adds to a token is linear in the token, so the forecast is a linear map of the normalized token:

    f(x) = W n,    n = x / RMS(x),    W = argmin Σ_t a_t ‖Δ_t − W n_t‖²,    a_t = 1 / ‖Δ_t‖²

The least squares are solved at conversion (`fitting`), the training loss is the same error (`forecast_miss`). Both need
updates Δ: those of the tokens that entered are known, and some others are computed for the purpose (`explore`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .least_squares import TINY, Normal
from .router import Router
from .routing import mean_square, normalized
from .slots import Slots, gather_tokens, scatter_tokens


class ZeroLinear(nn.Linear):
    """Starts at zero. A class of its own, because models are initialized module by module."""


class Forecast(nn.Module):
    """f(x) = W n: tokens that skip become x + f(x) instead of x + Δ(x). W starts at zero."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.linear = ZeroLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] → forecast of the update, [..., D]."""
        guess = self.linear(hidden_states)
        return guess * torch.rsqrt(mean_square(hidden_states, keepdim=True) + self.eps).to(guess.dtype)

    def fit(self, hidden_states: Tensor, update: Tensor, weight: Tensor) -> None:
        """Fit W to known updates.

        Args:
            hidden_states, update: x and Δ(x), float32 [N, D].
            weight: float32 [N], what each token counts besides a_t; 0: nothing.
        """
        inputs = normalized(hidden_states, self.eps)
        self.linear.weight.copy_(Normal(inputs, weight / (mean_square(update) + TINY)).solve(update).t())


def forecast_miss(update: Tensor, forecast: Tensor) -> Tensor:
    """‖Δ − f‖² / ‖Δ‖² of each token, float32 [...]: 1 without any forecast, 0 for a perfect one, whatever the scale.

    Args:
        update, forecast: Δ and f, [..., D]; Δ carries no gradient.
    """
    return mean_square(update.detach().float() - forecast.float()) / (mean_square(update.detach()) + TINY)


class KnownUpdates(NamedTuple):
    """Tokens whose update is known."""

    slots: Slots
    before: Tensor
    """x of each slot, [B, K, D]."""
    after: Tensor
    """x + Δ(x), [B, K, D]."""


class RegressionTargets(NamedTuple):
    """What forecast and score learn from; float32 [B, T] each, None where nothing learns it."""

    weight: Tensor | None = None
    """What each token counts; 0 where its update is not known."""
    cost: Tensor | None = None
    """What skipping loses (`Router.cost`)."""
    miss: Tensor | None = None
    """‖Δ − f‖² / ‖Δ‖²; its gradient reaches the forecast alone."""


def regression_targets(
    known: list[KnownUpdates], weight: Tensor, forecast: Forecast | None, router: Router
) -> RegressionTargets:
    """Compare known updates with the forecast, and measure what the score has to predict.

    Args:
        known: the tokens that entered, and those that were explored.
        weight: float32 [B, T], 0 for tokens that are in no slot.
        forecast, router: of the layer.
    """
    cost = miss = None
    for slots, before, after in known:
        state = before.detach()
        update = after.detach().float() - state.float()
        guess = None if forecast is None else forecast(state)
        if guess is not None:
            miss = _put(weight, miss, slots, forecast_miss(update, guess))
        lost = router.cost(update, guess)
        if lost is not None:
            cost = _put(weight, cost, slots, lost)
    return RegressionTargets(weight, cost, miss)


def _put(like: Tensor, into: Tensor | None, slots: Slots, values: Tensor) -> Tensor:
    """[B, T] with `values` [B, K] at the places of the slots whose token is a routed one; 0 where there is nothing."""
    into = (torch.zeros_like(like) if into is None else into).unsqueeze(-1)
    if slots.routed is not None:
        values = torch.where(slots.routed, values, gather_tokens(into, slots).squeeze(-1))
    return scatter_tokens(into, slots, values.unsqueeze(-1)).squeeze(-1)
