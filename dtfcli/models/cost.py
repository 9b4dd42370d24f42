"""Predicted costs: a token enters where skipping would lose most, and what that is can be estimated from the token.

The score is a linear function of the normalized token n = x / RMS(x), so it depends on nothing later:

    ŝ = w · n,    w = argmin Σ_t (ln(‖lost_t‖² / D) − w · n_t − mean)²

`update_size`: lost is the update Δ(x) that is skipped. `forecast_error`: lost is Δ(x) − f(x), what remains after the
forecast. The least squares are solved at conversion (`fitting`); training goes on by gradient (`cost_loss`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .context import RoutingContext
from .least_squares import TINY, Normal
from .outputs import RoutingRecord
from .router import Router, move_average
from .routing import Scores, masked_mean, mean_square, normalized


def log_size(x: Tensor) -> Tensor:
    """ln(‖x‖² / D) of each token: [..., D] → float32 [...]. The unit of what skipping loses."""
    return (mean_square(x) + TINY).log()


def cost_loss(scores: Tensor, cost: Tensor, weight: Tensor) -> Tensor:
    """How far predicted costs are from the true ones, up to a constant: the variance of their difference, 0-d.

    A score need not know the mean cost of its layer, since thresholds follow. When it had to learn the mean, it learned
    little else (R² after 50 steps 0.4 instead of 0.8 in upper layers of a pretrained model).

    Args:
        scores, cost: float32 [B, T].
        weight: float32 [B, T], 0 where the cost is not known.
    """
    error = scores - cost
    return masked_mean((error - masked_mean(error.detach(), weight)).square(), weight)


class UpdateSizeRouter(Router):
    """Scores a token by the predicted size of its update, ln(‖Δ‖² / D): what skipping loses without a forecast.

    Attributes:
        cost_offset: float32 [1], the constant that the score leaves out: predicted cost = score + cost_offset.
    """

    cost_offset: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))
        self.register_buffer("cost_offset", torch.empty(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.normal_(0.0, self.config.initializer_range)
        self.cost_offset.fill_(torch.nan)

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any) -> Scores:
        x = hidden_states.detach().float()
        # 1 / RMS(x), a number for each token, goes behind the product: the normalized states are never formed.
        scale = torch.rsqrt(mean_square(x) + self.eps)
        score = (x @ self.weight) * scale
        return Scores(score, torch.ones_like(score))

    def cost(self, update: Tensor, guess: Tensor | None) -> Tensor:
        return log_size(update)

    def loss(self, record: RoutingRecord, is_token: Tensor | None) -> list[Tensor]:
        """The squared error of predicted costs, where the true ones are known."""
        if record.cost is None or record.weight is None:
            return []
        return [cost_loss(record.scores, record.cost, record.weight)]

    def fit(self, hidden_states: Tensor, update: Tensor, guess: Tensor | None, weight: Tensor) -> None:
        cost = self.cost(update, guess)
        mean = (cost * weight).sum() / weight.sum().clamp(min=1)
        inputs = normalized(hidden_states, self.eps)
        self.weight.copy_(Normal(inputs, weight).solve((cost - mean).unsqueeze(1)).squeeze(1))
        self.cost_offset.copy_(masked_mean(cost - inputs @ self.weight, weight))

    def tracked(self) -> list[Tensor]:
        return [*super().tracked(), self.cost_offset]

    def track(self, record: RoutingRecord, threshold: Tensor) -> None:
        super().track(record, threshold)
        if record.cost is not None and record.weight is not None:
            offset = masked_mean(record.cost - record.scores, record.weight)
            move_average(self.cost_offset, torch.where(record.weight.any(), offset, self.cost_offset))

    def scalars(self) -> dict[str, float]:
        return {"cost_offset": self.cost_offset.item()}


class ForecastErrorRouter(UpdateSizeRouter):
    """Scores a token by the predicted error of its forecast, ln(‖Δ − f‖² / D): what skipping loses with one."""

    def cost(self, update: Tensor, guess: Tensor | None) -> Tensor:
        assert guess is not None, "`check_fields` asks for a forecast"
        return log_size(update - guess.detach().float())
