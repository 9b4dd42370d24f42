"""Thresholds of causal routing: tracked while training, calibrated afterward.

A threshold is the (1 − γ) quantile of a routed layer's scores (`share_threshold`). Each layer has one for the model's
own γ and one for each γ of `CAPACITY_GRID`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .context import RoutingContext
from .layers import RoutedLayerMixin
from .outputs import RoutingRecord
from .router import Router
from .routing import share_threshold


@torch.no_grad()
def track_thresholds(records: list[RoutingRecord], routers: Mapping[int, Router], context: RoutingContext) -> None:
    """Move each layer's threshold at the model's own γ toward this batch's."""
    for record in records:
        capacity = context.capacities[record.layer]
        threshold = share_threshold(record.scores, capacity, context.is_token, context.sinks)
        routers[record.layer].track(record, threshold)


@torch.no_grad()
def calibrate_layers(
    stack: Any,
    batches: Sequence[Mapping[str, Tensor]],
    targets: Sequence[tuple[str, float | None]],
    on_pass: Callable[[int, int], None] | None = None,
) -> None:
    """Measure thresholds on batches that advance through the stack together, layer by layer.

    At a routed layer the scores of all real tokens give one threshold, with which the batches then pass that layer,
    because the layers below change what it sees. The layers below the first routed one run once for all targets.

    Args:
        stack: a routed stack in eval mode.
        batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].
        targets: causal mode and γ of the grid (None: the model's own), in the order in which they are measured.
        on_pass: called with the number of targets that are measured, and with the number of all.
    """
    states = [stack.prepare(stack.embed_tokens(b["input_ids"]), b.get("attention_mask")) for b in batches]
    first, last = min(stack.routers), max(stack.routers)
    for index in range(first):
        for state in states:
            stack.run_layer(index, state)
    for count, (mode, capacity) in enumerate(targets, 1):
        passes = passes_at(states, mode, capacity)
        for index in range(first, last + 1):
            if isinstance(stack.layers[index], RoutedLayerMixin):
                calibrate_layer(stack, index, passes, mode, capacity)
            if index < last:  # nothing above is routed
                for state in passes:
                    stack.run_layer(index, state)
        if on_pass is not None:
            on_pass(count, len(targets))
    stack.forget_checks()


def calibrate_layer(
    stack: Any, index: int, passes: Sequence[Any], mode: str, capacity: float | None
) -> tuple[Tensor, Tensor]:
    """The threshold of one layer at γ (None: the model's own), kept in its router and in the contexts of the passes.

    Returns:
        The scores of all tokens of the passes, float32 [N], and the threshold, 0-d.
    """
    scores, is_token, sinks = [], [], []
    for state in passes:
        context = state.context
        nobody = torch.tensor(torch.inf, device=context.device)  # but sinks: the scores count
        context.thresholds[index] = nobody
        scores.append(stack.route(index, state, context)[1].scores.flatten())
        everyone = torch.ones_like(scores[-1], dtype=torch.bool)
        is_token.append(everyone if context.is_token is None else context.is_token.flatten())
        sinks.append(~everyone if context.sinks is None else context.sinks.flatten())
    pooled = torch.cat(scores)
    share = stack.config.layer_capacities()[index] if capacity is None else capacity
    threshold = share_threshold(pooled, share, torch.cat(is_token), torch.cat(sinks))
    stack.routers[index].set_threshold(mode, capacity, threshold)
    for state in passes:
        state.context.thresholds[index] = threshold
    return pooled, threshold


def passes_at(states: Sequence[Any], mode: str, capacity: float | None) -> list[Any]:
    """The batches again, to be routed in a causal mode at γ; None: at the model's own."""
    passes = []
    for state in states:
        capacities = state.context.capacities
        if capacity is not None:  # γ = 0 stands for the least that routes: sinks enter all the same
            capacities = dict.fromkeys(capacities, max(capacity, 1e-9))
        context = replace(state.context, mode=mode, capacities=capacities, thresholds={})
        passes.append(replace(state, context=context, prior_errors=[], records=[]))
    return passes
