"""Thresholds of causal routing: tracked while training, calibrated afterward.

A threshold is the (1 − γ) quantile of a routed layer's scores (`share_threshold`). Each layer has one for the model's
own γ (column 0) and one for each γ of `CAPACITY_GRID`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .layers import RoutedLayerMixin
from .outputs import RoutingRecord
from .routers import CAPACITY_GRID, Router, RoutingFrame
from .routing import share_threshold

_MOMENTUM = 0.9
"""Of the moving average of per-batch thresholds while training: it spans about ten updates."""


@torch.no_grad()
def track_thresholds(records: list[RoutingRecord], routers: Mapping[int, Router], frame: RoutingFrame) -> None:
    """Move each layer's own threshold toward this batch's; a first batch sets it."""
    for record in records:
        if not routers[record.layer].by_token:
            continue
        batch = share_threshold(record.scores, frame.capacities[record.layer], frame.real, frame.sinks)
        table = routers[record.layer].thresholds
        table[0] = torch.where(table[0].isnan(), batch, torch.lerp(batch, table[0], _MOMENTUM))


@torch.no_grad()
def calibrate_columns(stack: Any, batches: Sequence[Mapping[str, Tensor]], columns: Iterable[tuple[str, int]]) -> None:
    """Measure threshold columns, layer by layer, with the layers below already thresholded.

    All batches advance through the stack together: at a routed layer the scores of all their real tokens give one
    threshold, with which the batches then pass that layer. The layers below the first routed one are the same for
    all columns and run once.

    Args:
        stack: a routed stack in eval mode.
        batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].
        columns: causal mode and column of its table, in the order in which they are measured.

    Raises:
        ValueError: a mask that does not cover its tokens.
    """
    for batch in batches:
        stack.check_inputs(batch["input_ids"], None, batch.get("attention_mask"), None)
    first, last = min(stack.routers), max(stack.routers)
    entering = [stack.enter(stack.embed_tokens(b["input_ids"]), b.get("attention_mask")) for b in batches]
    for index in range(first):
        for batch in entering:
            stack.step(index, batch)
    for mode, column in columns:
        passes = [
            replace(b, frame=replace(b.frame, mode=mode, column=column), prior_errors=[], records=[]) for b in entering
        ]
        for index in range(first, last + 1):
            layer = stack.layers[index]
            if isinstance(layer, RoutedLayerMixin):
                scores = [
                    layer.rank(layer.reach(p.hidden_states, **p.layer_inputs), p.surprises, p.frame)[0] for p in passes
                ]
                layer.router.table(mode)[column] = share_threshold(
                    _pool(scores),
                    layer.router.capacity if column == 0 else CAPACITY_GRID[column - 1],
                    _pool([_all_if_none(p.frame.real, x, True) for p, x in zip(passes, scores, strict=True)]),
                    _pool([_all_if_none(p.frame.sinks, x, False) for p, x in zip(passes, scores, strict=True)]),
                )
            if index < last:  # nothing above is routed
                for batch in passes:
                    stack.step(index, batch)
    stack.forget_checks()


def _pool(tensors: list[Tensor]) -> Tensor:
    """[B, T] tensors of several batches as one row."""
    return torch.cat([tensor.flatten() for tensor in tensors]).unsqueeze(0)


def _all_if_none(mask: Tensor | None, like: Tensor, value: bool) -> Tensor:
    return torch.full_like(like, value, dtype=torch.bool) if mask is None else mask
