"""Slots: where the tokens that enter a routed layer sit while its block runs, and how they get there and back.

Routed tokens of a row fill their slots in position order, so plain causal attention is all the block needs. Shape
suffixes as in `routing`: B rows, R of them in a group, T tokens of a row, K slots, D hidden size.
"""

from typing import Any, NamedTuple

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
    if least == width:  # no free slots, so nothing to sort
        return Slots(chosen.nonzero()[:, 1].view(-1, width), rows=index)
    return assign_slots(chosen, width)._replace(rows=index)


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


def enter_layer(tokens: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """`gather_tokens`, and the tokens [B, T, D] that pass by, for `leave_layer` and nothing else.

    Gathering and scattering have a gradient for all tokens each, and these are added. But a token that enters has its
    gradient through the layer alone, and one that passes by keeps the one it came with: together they are one copy.
    """
    if not _apart(tokens, slots):
        return gather_tokens(tokens, slots), tokens
    entering, passing = _Enter.apply(tokens.flatten(0, 1), _flat_index(slots, tokens.shape[1]))
    return entering.unflatten(0, slots.position.shape), passing.view_as(tokens)


def leave_layer(passing: Tensor, slots: Slots, values: Tensor) -> Tensor:
    """`scatter_tokens`, into what `enter_layer` said passes by."""
    if not _apart(passing, slots):
        return scatter_tokens(passing, slots, values)
    flat = _flat_index(slots, passing.shape[1])
    values = values.to(passing.dtype).flatten(0, 1)
    return _Leave.apply(passing.flatten(0, 1), flat, values).view_as(passing)


def _apart(tokens: Tensor, slots: Slots) -> bool:
    """Whether tokens that enter and tokens that pass by have gradients of their own."""
    return torch.is_grad_enabled() and tokens.requires_grad and not slots.whole


class _Enter(torch.autograd.Function):
    """(the tokens at `flat`, all tokens); the latter are for `_Leave` and nothing else."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(flat)
        return tokens.index_select(0, flat), tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad_entering: Tensor, grad_passing: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        return grad_passing.index_copy(0, flat, grad_entering), None


class _Leave(torch.autograd.Function):
    """All tokens, those at `flat` replaced. Their own gradient, 0, is left for `_Enter` to write over."""

    @staticmethod
    def forward(ctx: Any, passing: Tensor, flat: Tensor, updated: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        return passing.index_copy(0, flat, updated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (flat,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, flat)
