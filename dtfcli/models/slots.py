"""Slots: where the tokens that enter a routed layer sit while its block runs, and how they get there and back.

Routed tokens of a row fill their slots in position order, so plain causal attention is all the block needs. All rows
go through the block together, with as many slots each. Shape suffixes as in `routing`: B rows, T tokens of a row, K
slots, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where the routed tokens of a batch sit while the block runs: in position order, then free slots.

    A free slot holds a token that is not routed, a different one for each, so that writing back never collides; being
    last it is seen by no routed token under causal attention.
    """

    position: Tensor
    """int64 [B, K], position of the token in each slot."""
    routed: Tensor | None = None
    """bool [B, K], False for free slots; None: there are none."""
    whole: bool = False
    """Every token has a slot, in its place: gathering and scattering have nothing to do."""


def every_slot(rows: int, tokens: int, device: torch.device) -> Slots:
    """Slots for all tokens of all rows."""
    return Slots(torch.arange(tokens, device=device).expand(rows, tokens), whole=True)


def assign_slots(selected: Tensor, width: int) -> Slots:
    """Slots for the selected tokens of all rows, some of them free.

    Args:
        selected: bool [B, T].
        width: slots of each row; at least as many as any row has selected tokens.
    """
    rows, tokens = selected.shape
    if tokens == 1:
        return every_slot(rows, tokens, selected.device)._replace(routed=selected)
    order_BT = selected.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    routed_BK = torch.arange(width, device=selected.device) < selected.sum(1, keepdim=True)
    return Slots(order_BT[:, :width], routed_BK)


def _flat_index(slots: Slots, tokens: int) -> Tensor:
    """Index of each slot's token in the rows laid end to end, int64 [B · K]."""
    rows = torch.arange(len(slots.position), device=slots.position.device)
    return (slots.position + rows.unsqueeze(1) * tokens).flatten()


def gather_tokens(tokens: Tensor, slots: Slots) -> Tensor:
    """[B, T, D] → [B, K, D]: the token of each slot. [1, T, D], the same for all rows, will do."""
    if slots.whole:
        return tokens
    flat = slots.position.flatten() if tokens.shape[0] == 1 else _flat_index(slots, tokens.shape[1])
    return tokens.flatten(0, 1).index_select(0, flat).unflatten(0, slots.position.shape)


def scatter_tokens(tokens: Tensor, slots: Slots, values: Tensor) -> Tensor:
    """[B, T, D] with `values` [B, K, D] written where the slots' tokens came from."""
    values = values.to(tokens.dtype)
    if slots.whole:
        return values
    flat = _flat_index(slots, tokens.shape[1])
    return tokens.flatten(0, 1).index_copy(0, flat, values.flatten(0, 1)).view_as(tokens)
