"""What a routed layer's forecast and score learn from: the updates that are known.

While training, the tokens that enter show what they would have lost by skipping; some of the others are looked at
without gradient (`explore`). Shape suffixes as in `routing`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .routing import forecast_miss, log_size
from .slots import Slots, gather_tokens, scatter_tokens


class Known(NamedTuple):
    """Tokens whose update is known."""

    slots: Slots
    before: Tensor
    """x of each slot, [R, K, D]."""
    after: Tensor
    """x + Δ(x), [R, K, D]."""


class Lesson(NamedTuple):
    """What they say; float32 [B, T] each, None where nothing learns it."""

    weight: Tensor | None
    """What each token counts; 0 where its update is not known."""
    cost: Tensor | None
    """What skipping loses: ln(‖Δ‖² / D), or against the forecast ln(‖Δ − f‖² / D)."""
    miss: Tensor | None
    """‖Δ − f‖² / ‖Δ‖²; its gradient reaches the forecast alone."""


def learn(known: list[Known], hidden_states: Tensor, weight: Tensor, forecast: Any, config: Any) -> Lesson:
    """Compare updates with the forecast, and measure what the score has to predict.

    Args:
        known: the tokens that entered, and those that were looked at.
        hidden_states: [B, T, D], before the routed part.
        weight: float32 [B, T], 0 for tokens that are in no slot.
        forecast: the layer's forecast, or None.
        config: of the model.
    """
    cost = torch.zeros_like(weight)
    miss = torch.zeros_like(weight)
    for slots, before, after in known:
        state = before.detach()
        lost = update = after.detach().float() - state.float()
        if forecast is not None:
            guess = forecast(state)
            miss = _put(miss, slots, forecast_miss(update, guess))
            if config.score == "forecast_error":
                lost = update - guess.detach().float()
        cost = _put(cost, slots, log_size(lost))
    if config.budget == "model":  # one threshold for all layers: the loss in relation to the token as it is there
        cost = cost - log_size(hidden_states.detach())
    return Lesson(weight, cost if config.predicts_cost else None, None if forecast is None else miss)


def _put(into: Tensor, slots: Slots, values: Tensor) -> Tensor:
    """[B, T] with `values` [R, K] at the places of the slots whose token is a routed one."""
    if slots.routed is not None:
        values = torch.where(slots.routed, values, gather_tokens(into.unsqueeze(-1), slots).squeeze(-1))
    return scatter_tokens(into.unsqueeze(-1), slots, values.unsqueeze(-1)).squeeze(-1)
