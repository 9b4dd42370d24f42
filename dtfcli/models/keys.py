"""Whose keys and values the routed tokens of a layer attend to, and the mask that goes with them.

    OwnKeys     of the routed tokens of the same forward pass (no cache)
    StoredKeys  the same, behind what the cache holds for their rows
    PlacedKeys  the same, without looking at the device: for all rows, with a mask for what they do not store
    EveryKey    of all tokens, routed or not (`kv_tokens = "all"`)

The stock attention asks its cache for keys and values through `update`; these objects answer.

Shape suffixes: R rows that route something, K slots, H key/value heads, S keys, E size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache import RoutedLayerCache
from .routers import TokenFrame
from .slots import Slots


def as_mask(visible: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """Which keys each token may attend to, bool [R, 1, K, S], in the form that an attention implementation takes.

    Raises:
        ValueError: it takes no such mask.
    """
    if implementation == "eager":
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    if implementation.startswith("flash") and visible.shape[2] == 1:
        return visible[:, 0, 0].long()
    if implementation != "sdpa":
        raise ValueError(
            f"attn_implementation = {implementation!r}: continuing a cache with several tokens at once and "
            "kv_tokens = 'all' need masks that it does not take; use 'sdpa'"
        )
    return visible


class OwnKeys:
    """Routed tokens attend to each other. They fill their slots in position order: plain causal attention serves."""

    as_cache: Any = None
    """What to pass to the block as its cache; None: the block's own keys are all there is."""

    def of_rows(self, rows: list[int], slots: Slots) -> "OwnKeys":
        """Those that the rows of a group attend to."""
        return self

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        """Which keys each slot may attend to, bool [R, 1, K, S]; None: plain causal attention."""
        return None

    def mask(self, hidden_states: Tensor, slots: Slots, frame: Any, config: Any) -> Tensor | None:
        """The attention mask in the form that the configured attention implementation takes.

        Raises:
            ValueError: flash or flex attention would need a mask that it cannot take.
        """
        visible, implementation = self.visible(slots, frame), config._attn_implementation
        if visible is None:
            if implementation == "sdpa":
                return None
            return create_causal_mask(config, hidden_states, None, None)
        return as_mask(visible, hidden_states.dtype, implementation)


class StoredKeys(OwnKeys):
    """Routed tokens attend to the stored ones of their row and to each other, and are stored themselves.

    Args:
        store: the layer's part of the cache, which knows already which of the new positions are routed.
        counts: new routed tokens of each row of the batch.
        rows: the rows of a group.
    """

    def __init__(self, store: RoutedLayerCache, counts: list[int], rows: list[int] | None = None) -> None:
        self.store = store
        self.counts = counts
        self.rows = rows or []

    @property
    def as_cache(self) -> "StoredKeys":
        return self

    def of_rows(self, rows: list[int], slots: Slots) -> "StoredKeys":
        return StoredKeys(self.store, self.counts, rows)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with the keys and values of the slots, [R, H, K, E]."""
        return self.store.append(keys, values, self.rows, [self.counts[row] for row in self.rows])

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        before = [self.store.counts[row] for row in self.rows]
        after = [self.store.counts[row] + self.counts[row] for row in self.rows]
        width, device = slots.position.shape[1], slots.position.device
        if not any(before) or (width == 1 and min(after) == max(after)):
            return None
        last_RK = torch.tensor(before, device=device).unsqueeze(1) + torch.arange(width, device=device)
        return (torch.arange(max(after), device=device) <= last_RK.unsqueeze(-1)).unsqueeze(1)


class PlacedKeys(OwnKeys):
    """As `StoredKeys`, for all rows at once, where only the device knows how many tokens each of them stores.

    Args:
        store: as there.
        slots: of the tokens that come.
    """

    def __init__(self, store: RoutedLayerCache, slots: Slots | None = None) -> None:
        self.store, self.slots = store, slots

    @property
    def as_cache(self) -> "PlacedKeys":
        return self

    def of_rows(self, rows: list[int], slots: Slots) -> "PlacedKeys":
        return PlacedKeys(self.store, slots)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with the keys and values of the slots, [B, H, K, E]."""
        assert self.slots is not None, "the slots of a group are known before its attention runs"
        assert self.slots.routed is not None, "without a look, any slot may be free"
        return self.store.place(keys, values, self.slots.routed)

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        if self.store.most == 0:
            return None
        width, device = slots.position.shape[1], slots.position.device
        last_BK = self.store.stored.unsqueeze(1) + torch.arange(width, device=device)
        stored = torch.arange(self.store.most + width, device=device)
        return (stored <= last_BK.unsqueeze(-1)).unsqueeze(1)


class EveryKey(OwnKeys):
    """Routed tokens attend to every real token of their row up to themselves, or to some and to themselves.

    Args:
        keys, values: [B, H, S, E], of all positions seen so far.
        offered: bool [B, S], whose keys are offered to others; None: those of all real tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, offered: Tensor | None = None) -> None:
        self.keys, self.values, self.offered = keys, values, offered

    @property
    def as_cache(self) -> "EveryKey":
        return self

    def of_rows(self, rows: list[int], slots: Slots) -> "EveryKey":
        if slots.rows is None:
            return self
        keys, values = (part.index_select(0, slots.rows) for part in (self.keys, self.values))
        return EveryKey(keys, values, None if self.offered is None else self.offered.index_select(0, slots.rows))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention; the slots' own keys are among those that are here already."""
        return self.keys, self.values

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        if isinstance(frame, TokenFrame) and frame.there is not None:
            return frame.there[:, None, None]
        tokens, offered = frame.shape[1], self.offered
        every_token = (slots.routed is None or tokens == 1) and slots.position.shape[1] == tokens
        if offered is None and frame.seen is None and every_token and (frame.past == 0 or tokens == 1):
            return None  # each sees all keys up to its own
        at = (slots.position + frame.past).unsqueeze(-1)
        positions = torch.arange(self.keys.shape[2], device=at.device)
        visible = positions <= at
        if offered is None and frame.seen is not None:
            offered = frame.seen if slots.rows is None else frame.seen.index_select(0, slots.rows)
        if offered is not None:
            # A free slot may hold padding: it sees itself, lest its softmax be empty and its gradient NaN.
            visible = visible & (offered.unsqueeze(1) | (positions == at))
        return visible.unsqueeze(1)
