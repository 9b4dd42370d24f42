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
from .routing import masked_mean, share_threshold

_MOMENTUM = 0.9
"""Of the moving average of per-batch thresholds while training: it spans about ten updates."""


@torch.no_grad()
def track_thresholds(records: list[RoutingRecord], routers: Mapping[int, Router], frame: RoutingFrame) -> None:
    """Move each layer's own threshold, and the level of its predicted costs, toward this batch's; a first sets them."""
    for record in records:
        if record.cost is not None and record.weight is not None:
            router: Any = routers[record.layer]
            level = _moved(router.level, masked_mean(record.cost - record.scores, record.weight))
            router.level.copy_(torch.where(record.weight.any(), level, router.level))
    tracked = [record for record in records if routers[record.layer].by_token]
    together = [tracked] if frame.config.budget == "model" and tracked else [[record] for record in tracked]
    for group in together:
        shared = len(group) > 1  # its threshold is that of the model's own γ, wherever γ is on its way
        capacity = routers[group[0].layer].capacity if shared else frame.capacities[group[0].layer]
        levels = [_level(routers[record.layer]) if shared else record.scores.new_zeros(1) for record in group]
        batch = share_threshold(
            torch.cat([record.scores + level for record, level in zip(group, levels, strict=True)]),
            capacity,
            None if frame.real is None else frame.real.repeat(len(group), 1),
            None if frame.sinks is None else frame.sinks.repeat(len(group), 1),
        )
        for record, level in zip(group, levels, strict=True):
            table = routers[record.layer].thresholds
            table[:1] = _moved(table[:1], batch - level)


def _moved(average: Tensor, batch: Tensor) -> Tensor:
    return torch.where(average.isnan(), batch, torch.lerp(batch, average, _MOMENTUM))


def _level(router: Any) -> Tensor:
    """What has to be added to a layer's scores to make them costs; 0 before any training."""
    return router.level.nan_to_num()


@torch.no_grad()
def calibrate_columns(stack: Any, batches: Sequence[Mapping[str, Tensor]], columns: Iterable[tuple[str, int]]) -> None:
    """Measure threshold columns on batches that advance through the stack together.

    With a budget for each layer, layer by layer: at a routed layer the scores of all real tokens give one threshold,
    with which the batches then pass that layer, because the layers below change what it sees. With one budget for the
    model, in rounds: all layers route by a common threshold, and their scores together give the next one.

    The layers below the first routed one are the same for all columns and run once.

    Args:
        stack: a routed stack in eval mode.
        batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].
        columns: causal mode and column of its table, in the order in which they are measured.
    """
    entering = [stack.enter(stack.embed_tokens(b["input_ids"]), b.get("attention_mask")) for b in batches]
    for index in range(min(stack.routers)):
        for batch in entering:
            stack.step(index, batch)
    common = torch.tensor(-torch.inf)
    for mode, column in columns:
        if stack.config.budget == "model" and mode == "threshold":
            common = _calibrate_model(stack, entering, column, common)
        else:
            _calibrate_layers(stack, entering, mode, column)
    stack.forget_checks()


def _calibrate_layers(stack: Any, entering: Sequence[Any], mode: str, column: int) -> None:
    """One threshold for each layer, from the bottom up."""
    passes, last = passes_at(entering, mode, column), max(stack.routers)
    for index in range(min(stack.routers), last + 1):
        if isinstance(stack.layers[index], RoutedLayerMixin):
            calibrate_layer(stack, index, passes, mode, column)
        if index < last:  # nothing above is routed
            for batch in passes:
                stack.step(index, batch)


def calibrate_layer(stack: Any, index: int, passes: Sequence[Any], mode: str, column: int) -> list[Tensor]:
    """The threshold of one layer, for batches that stand before it; returns their scores, [B, T] each."""
    router = stack.layers[index].router
    capacity = router.capacity if column == 0 else CAPACITY_GRID[column - 1]
    router.table(mode)[column] = torch.inf  # nobody enters but sinks: the scores are what is wanted
    scores = [stack.route(index, batch, batch.frame).ranked for batch in passes]
    router.table(mode)[column] = _pooled_threshold(scores, capacity, [batch.frame for batch in passes])
    return scores


_ROUNDS = 4
"""Of calibration with one budget: a threshold changes what the layers above see, and so their scores."""


def _calibrate_model(stack: Any, entering: Sequence[Any], column: int, common: Tensor) -> Tensor:
    """One threshold for all layers, which is returned; the first round begins with that of another column."""
    capacity = stack.config.capacity if column == 0 else CAPACITY_GRID[column - 1]
    for _ in range(_ROUNDS):
        for router in stack.routers.values():
            router.thresholds[column] = common - _level(router)
        passes = passes_at(entering, "threshold", column)
        for index in range(min(stack.routers), max(stack.routers) + 1):
            for batch in passes:
                stack.step(index, batch)
        records = [(record, batch.frame) for batch in passes for record in batch.records]
        costs = [record.scores + _level(stack.routers[record.layer]) for record, _ in records]
        common = _pooled_threshold(costs, capacity, [frame for _, frame in records])
    for router in stack.routers.values():
        router.thresholds[column] = common - _level(router)
    return common


def passes_at(entering: Sequence[Any], mode: str, column: int) -> list[Any]:
    """The batches before their first routed layer, routed by a column."""
    passes = []
    for batch in entering:
        capacities = batch.frame.capacities
        if column:  # γ = 0 stands for the least that routes: sinks enter all the same
            capacities = dict.fromkeys(capacities, max(CAPACITY_GRID[column - 1], 1e-9))
        frame = replace(batch.frame, mode=mode, column=column, capacities=capacities)
        passes.append(replace(batch, frame=frame, prior_errors=[], records=[]))
    return passes


def _pooled_threshold(scores: list[Tensor], capacity: float, frames: list[RoutingFrame]) -> Tensor:
    """The threshold that routes the share γ of the tokens of several batches together."""
    real = [_all_if_none(frame.real, x, True) for frame, x in zip(frames, scores, strict=True)]
    sinks = [_all_if_none(frame.sinks, x, False) for frame, x in zip(frames, scores, strict=True)]
    return share_threshold(_pool(scores), capacity, _pool(real), _pool(sinks))


def _pool(tensors: list[Tensor]) -> Tensor:
    """[B, T] tensors of several batches as one row."""
    return torch.cat([tensor.flatten() for tensor in tensors]).unsqueeze(0)


def _all_if_none(mask: Tensor | None, like: Tensor, value: bool) -> Tensor:
    return torch.full_like(like, value, dtype=torch.bool) if mask is None else mask
