"""Forecasts and predicted costs by least squares: from one pass over some text, before any training.

What a layer adds to a token is for the most part linear in the token, so the forecast f(x) = W n need not be found
step by step (n = x / RMS(x), Δ the update of the routed part, t a token):

    W = argmin Σ_t a_t ‖Δ_t − W n_t‖²,    a_t = 1 / ‖Δ_t‖²,

which is the loss of training, `forecast_miss`. The estimate of what skipping costs is linear, too:

    w = argmin Σ_t (ln(‖Δ_t − W n_t‖² / D) − w · n_t − mean)²,

and says which tokens skip. A forecast is for these, so both are fitted again, with little weight on those that enter.

Layer by layer from the bottom up, as in `calibration`: the tokens that skip below change what a layer sees. Each layer
visits the device for its turn alone, so a model that is to be sharded over many can be fitted on one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .calibration import calibrate_layer, passes_at
from .layers import RoutedLayerMixin
from .priors import normalized
from .routing import _TINY, log_size, mean_square

LOST_POINTS = 64
"""Shares of skipping tokens for which is told what they lose."""

_ROUNDS = 2
"""Of forecast, then costs; a third changes nothing."""
_ENTERING = 0.05
"""Weight, in the forecast's second fit, of tokens that enter: γ may be another one tomorrow."""
_RIDGE = 1e-2
"""Added to the diagonal of the normal equations, as a share of its mean."""


def least_squares(inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """The matrix W with the smallest Σ_t weight_t ‖target_t − W input_t‖² and a slight ridge; float32 [E, D].

    Args:
        inputs: float32 [N, D].
        targets: float32 [N, E].
        weight: float32 [N].
    """
    weighted = inputs * (weight / weight.sum().clamp(min=_TINY)).unsqueeze(1)
    moments, crossed = weighted.t() @ inputs, weighted.t() @ targets
    ridge = _RIDGE * moments.diagonal().mean() + _TINY
    return torch.linalg.solve(moments + ridge * torch.eye(len(moments), device=moments.device), crossed).t()


@torch.no_grad()
def fit_layers(
    stack: Any,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """Fit forecasts and predicted costs of every routed layer, with the threshold of its own γ.

    Args:
        stack: a routed stack in eval mode.
        batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T], where the stack is.
        device: that computes.
        on_layer: called with how many layers are done, and how many there are.

    Returns:
        For each routed layer whose score predicts costs, float32 [LOST_POINTS + 1]: the part of ‖Δ − f‖² / ‖x + Δ‖²,
        summed over all tokens but sinks, that is lost when the shares 0, 1 / LOST_POINTS, … 1 of them skip, those that
        score lowest first.
    """
    curves: dict[int, Tensor] = {}
    embedded = [(stack.embed_tokens(b["input_ids"]).to(device), b.get("attention_mask")) for b in batches]
    entering = [stack.enter(x, None if mask is None else mask.to(device)) for x, mask in embedded]
    passes, last = passes_at(entering, "threshold", 0), max(stack.routers)
    for index in range(last + 1):
        if on_layer is not None:
            on_layer(index, last + 1)
        layer, home = stack.layers[index], stack.device
        layer.to(device)
        if isinstance(layer, RoutedLayerMixin):
            curve = _fit_layer(stack, index, passes)
            if curve is not None:
                curves[index] = curve
        if index < last:  # nothing above is routed
            for batch in passes:
                stack.step(index, batch)
        layer.to(home)
    stack.forget_checks()
    return curves


def _fit_layer(stack: Any, index: int, passes: Sequence[Any]) -> Tensor | None:
    layer, config = stack.layers[index], stack.config
    before, after, counted = _updates(stack, index, passes)
    update = after - before
    with torch.autocast(before.device.type, enabled=False):
        inputs = normalized(before, config.rms_norm_eps)
        skips = counted
        for _ in range(_ROUNDS):
            lost = update
            if layer.forecast_prior is not None:
                weight = skips.clamp(min=_ENTERING) * counted / (mean_square(update) + _TINY)
                _fit_forecast(layer.forecast_prior, before, inputs, update, weight)
                if config.score == "forecast_error":
                    lost = update - layer.forecast_prior(before.to(layer.forecast_prior.linear.weight.dtype)).float()
            if config.predicts_cost:
                cost = log_size(lost) - (log_size(before) if config.budget == "model" else 0.0)
                _fit_costs(layer.router, before, inputs, cost, counted)
            if not layer.router.by_token:
                return None
            scores = torch.cat([x.flatten() for x in calibrate_layer(stack, index, passes, "threshold", 0)])
            skips = (scores <= layer.router.thresholds[0]).float()
        relative, real = mean_square(lost) / (mean_square(after) + _TINY), counted > 0
        return _lost(scores[real], relative[real]) if config.predicts_cost else None


def _lost(scores: Tensor, energy: Tensor) -> Tensor:
    """Share of the energy of the tokens that score lowest, [N] each → float32 [LOST_POINTS + 1]."""
    summed = torch.cat([energy.new_zeros(1), energy[scores.argsort()].cumsum(0)])
    at = torch.linspace(0, len(scores), LOST_POINTS + 1, device=scores.device).round().long()
    return summed[at] / summed[-1].clamp(min=_TINY)


def _updates(stack: Any, index: int, passes: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What all tokens are before and after the routed part, float32 [N, D]; which of them count, float32 [N]."""
    before, after, counted = [], [], []
    for batch in passes:
        everyone = {**batch.frame.capacities, index: 1.0}
        frame = replace(batch.frame, column=None, capacities=everyone, shows_updates=True)
        out = stack.route(index, batch, frame)
        before.append(out.before.flatten(0, 1).float())
        after.append(out.after.flatten(0, 1).float())
        real = torch.ones(frame.shape, dtype=torch.bool, device=frame.device) if frame.real is None else frame.real
        counted.append((real if frame.sinks is None else real & ~frame.sinks).flatten().float())
    return torch.cat(before), torch.cat(after), torch.cat(counted)


def _fit_forecast(forecast: Any, before: Tensor, inputs: Tensor, update: Tensor, weight: Tensor) -> None:
    """The linear part; the network, if there is one, stays as it is."""
    matrix = forecast.linear.weight
    matrix.zero_()
    matrix.copy_(least_squares(inputs, update - forecast(before.to(matrix.dtype)).float(), weight))


def _fit_costs(router: Any, before: Tensor, inputs: Tensor, cost: Tensor, counted: Tensor) -> None:
    """The linear part, likewise, and the level; tokens [N] are one row."""
    router.weight.zero_()
    rest = cost - router(before.unsqueeze(0)).score.squeeze(0)
    mean = (rest * counted).sum() / counted.sum().clamp(min=1)
    router.weight.copy_(least_squares(inputs, (rest - mean).unsqueeze(1), counted).squeeze(0))
    error = cost - router(before.unsqueeze(0)).score.squeeze(0)
    router.level.copy_((error * counted).sum() / counted.sum().clamp(min=1))
