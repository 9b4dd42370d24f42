"""Forecasts and predicted costs by least squares: from one pass over some text, before any training.

What a layer adds to a token is for the most part linear in the token. So neither the forecast (`forecast`) nor the
estimate of what skipping loses (`cost`) need be found step by step: both are solved for. A forecast is for the tokens
that skip, and the estimate says which do, so both are fitted again, with little weight on the tokens that enter.

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

_ROUNDS = 2
"""Of forecast, then costs; a third changes nothing."""
_ENTERING = 0.05
"""Weight, in the forecast's second fit, of tokens that enter: γ may be another one tomorrow."""


@torch.no_grad()
def fit_layers(
    stack: Any,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    on_layer: Callable[[int, int], None] | None = None,
) -> None:
    """Fit forecasts and predicted costs of every routed layer, with the threshold of its own γ.

    Args:
        stack: a routed stack in eval mode.
        batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T], where the stack is.
        device: that computes.
        on_layer: called with the number of layers that are ready, and with the number of all.
    """
    embedded = [(stack.embed_tokens(b["input_ids"]).to(device), b.get("attention_mask")) for b in batches]
    states = [stack.prepare(x, None if mask is None else mask.to(device)) for x, mask in embedded]
    passes, last = passes_at(states, "threshold", None), max(stack.routers)
    for index in range(last + 1):
        if on_layer is not None:
            on_layer(index, last + 1)
        layer, home = stack.layers[index], stack.device
        layer.to(device)
        if isinstance(layer, RoutedLayerMixin):
            _fit_layer(stack, index, passes)
        if index < last:  # nothing above is routed
            for state in passes:
                stack.run_layer(index, state)
        layer.to(home)
    stack.forget_checks()


def _fit_layer(stack: Any, index: int, passes: Sequence[Any]) -> None:
    layer = stack.layers[index]
    before, after, counted = _updates(stack, index, passes)
    update, skips, guess = after - before, counted, None
    with torch.autocast(before.device.type, enabled=False):
        for _ in range(_ROUNDS):
            if layer.forecast is not None:
                layer.forecast.fit(before, update, skips.clamp(min=_ENTERING) * counted)
                guess = layer.forecast(before.to(layer.forecast.linear.weight.dtype)).float()
            layer.router.fit(before, update, guess, counted)
            if not layer.router.by_token:
                share = passes[0].context.capacities[index]
                for state in passes:
                    state.context.thresholds[index] = layer.router.threshold_at("threshold", share, share)
                return
            scores, threshold = calibrate_layer(stack, index, passes, "threshold", None)
            skips = (scores <= threshold).float()


def _updates(stack: Any, index: int, passes: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What all tokens are before and after the routed part, float32 [N, D]; which of them count, float32 [N]."""
    before, after, counted = [], [], []
    for state in passes:
        context = state.context
        everyone = torch.ones(context.shape, dtype=torch.bool, device=context.device)
        is_token = everyone if context.is_token is None else context.is_token
        capacities = {**context.capacities, index: 1.0}
        context = replace(context, capacities=capacities, chosen={index: is_token}, shows_updates=True)
        record = stack.route(index, state, context)[1]
        before.append(record.before.flatten(0, 1).float())
        after.append(record.after.flatten(0, 1).float())
        counted.append((is_token if context.sinks is None else is_token & ~context.sinks).flatten().float())
    return torch.cat(before), torch.cat(after), torch.cat(counted)
