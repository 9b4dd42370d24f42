"""Slots: where the tokens that enter a routed layer sit while its block runs, and how they get there and back.

Routed tokens of a row fill their slots in position order, so plain causal attention is all the block needs. Shape
suffixes as in `routing`: B rows, R of them in a group, T tokens of a row, K slots, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where the routed tokens of some rows sit while the block runs: in position order, then free slots.

    A free slot holds a token that is not routed, a different one for each, so that writing back never collides; being
    last it is seen by no routed token under causal attention. R of the B rows take part, with T tokens each.
    """

    position: Tensor
    """int64 [R, K], position of the token in each slot."""
    routed: Tensor | None = None
    """bool [R, K], False for free slots; None: there are none."""
    rows: Tensor | None = None
    """int64 [R], which rows take part; None: all."""
    whole: bool = False
    """Every token of every row is routed: gathering and scattering have nothing to do."""


def row_groups(counts: list[int], padding: float = 0.03, small: int = 256) -> list[list[int]]:
    """Rows that route something, in groups whose members route about as many tokens: a group costs its fullest row.

    Args:
        counts: routed tokens of each row.
        padding: most free slots in a row of a group, as a share of its slots.
        small: a group with fewer slots than this takes any row: a small matrix product costs more than free slots.

    Returns:
        Increasing row indices, the fullest rows' group first.
    """
    if len(counts) == 1:
        return [[0]] if counts[0] else []
    groups: list[list[int]] = []
    for row in sorted((row for row, count in enumerate(counts) if count), key=lambda row: -counts[row]):
        fullest = counts[groups[-1][0]] if groups else 0
        if groups and (counts[row] >= (1 - padding) * fullest or fullest * len(groups[-1]) < small):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


def every_slot(rows: int, tokens: int, device: torch.device) -> Slots:
    """Slots for all tokens of all rows."""
    return Slots(torch.arange(tokens, device=device).expand(rows, tokens), whole=True)


def assign_slots(selected: Tensor, width: int) -> Slots:
    """Slots for the selected tokens of all rows, some of them free.

    Args:
        selected: bool [B, T].
        width: slots of each row; at least as many as any row has selected tokens.
    """
    order_BT = selected.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    routed_BK = torch.arange(width, device=selected.device) < selected.sum(1, keepdim=True)
    return Slots(order_BT[:, :width], routed_BK)


def assign_group(selected: Tensor, rows: list[int], counts: list[int]) -> Slots:
    """Slots for the selected tokens of some rows, as many as the fullest of them needs.

    Args:
        selected: bool [B, T].
        rows: increasing row indices, each with selected tokens.
        counts: selected tokens of each of those rows.
    """
    (batch, tokens), device = selected.shape, selected.device
    everyone = len(rows) == batch
    index = None if everyone else torch.tensor(rows, device=device)
    width, least = max(counts), min(counts)
    if least == tokens:
        positions_RT = torch.arange(tokens, device=device).expand(len(rows), tokens)
        return Slots(positions_RT, rows=index, whole=everyone)
    chosen = selected if index is None else selected.index_select(0, index)
    slots = assign_slots(chosen, width)
    return Slots(slots.position, slots.routed if least < width else None, index)


def _flat_index(slots: Slots, tokens: int) -> Tensor:
    """Index of each slot's token in the rows laid end to end, int64 [R · K]."""
    rows = torch.arange(len(slots.position), device=slots.position.device) if slots.rows is None else slots.rows
    return (slots.position + rows.unsqueeze(1) * tokens).flatten()


def gather_tokens(tokens: Tensor, slots: Slots) -> Tensor:
    """[B, T, D] → [R, K, D]: the token of each slot. [1, T, D], the same for all rows, will do."""
    if slots.whole:
        return tokens
    flat = slots.position.flatten() if tokens.shape[0] == 1 else _flat_index(slots, tokens.shape[1])
    return tokens.flatten(0, 1).index_select(0, flat).unflatten(0, slots.position.shape)


def scatter_tokens(tokens: Tensor, slots: Slots, values: Tensor) -> Tensor:
    """[B, T, D] with `values` [R, K, D] written where the slots' tokens came from."""
    values = values.to(tokens.dtype)
    if slots.whole:
        return values
    flat = _flat_index(slots, tokens.shape[1])
    return tokens.flatten(0, 1).index_copy(0, flat, values.flatten(0, 1)).view_as(tokens)
