"""Whose keys and values the routed tokens of a layer attend to, and the mask that goes with them.

    OwnKeys     those of the routed tokens of the same forward pass (no cache)
    StoredKeys  the same, behind what the cache holds for their rows
    EveryKey    those of all tokens, routed or not (`kv_tokens = "all"`)

The stock attention asks its cache for keys and values through `update`; these objects answer.

Shape suffixes: R rows that route something, K slots, H key/value heads, S keys, E size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache import RoutedLayerCache
from .routing import Slots


class OwnKeys:
    """Routed tokens attend to each other. They fill their slots in position order: plain causal attention serves."""

    def for_slots(self, slots: Slots) -> Any:
        """What to pass to the block as its cache; None: the block's own keys are all there is."""
        return None

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        """Which keys each slot may attend to, bool [R, 1, K, S]; None: plain causal attention."""
        return None

    def mask(self, hidden_states: Tensor, slots: Slots, frame: Any, config: Any) -> Tensor | None:
        """The attention mask in the form that the configured attention implementation takes.

        Raises:
            ValueError: flash or flex attention would need a mask that it cannot take.
        """
        visible = self.visible(slots, frame)
        if visible is None:
            return create_causal_mask(config, hidden_states, None, None)
        implementation = config._attn_implementation
        if implementation == "eager":
            blocked = torch.finfo(hidden_states.dtype).min
            return torch.zeros_like(visible, dtype=hidden_states.dtype).masked_fill(~visible, blocked)
        if implementation.startswith("flash") and visible.shape[2] == 1:
            return visible[:, 0, 0].long()
        if implementation != "sdpa":
            raise ValueError(
                f"attn_implementation = {implementation!r}: continuing a cache with several tokens at once and "
                "kv_tokens = 'all' need masks that it does not take; use 'sdpa'"
            )
        return visible


class StoredKeys(OwnKeys):
    """Routed tokens attend to the stored ones of their row and to each other, and are stored themselves.

    Args:
        store: the layer's part of the cache, already told which of the new positions are routed.
        counts: new routed tokens of each row of the batch.
    """

    def __init__(self, store: RoutedLayerCache, counts: list[int]) -> None:
        self.store = store
        self.counts = counts

    def for_slots(self, slots: Slots) -> "StoredKeys":
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with the keys and values of the slots, [R, H, K, E]."""
        return self.store.append(keys, values, self.counts)

    def visible(self, slots: Slots, frame: Any) -> Tensor | None:
        rows = [row for row, count in enumerate(self.counts) if count]
        before = [self.store.counts[row] for row in rows]
        width = slots.position.shape[1]
        if not any(before):
            return None
        after = [self.store.counts[row] + self.counts[row] for row in rows]
        last = torch.tensor(before, device=slots.position.device).view(-1, 1, 1, 1) + torch.arange(
            width, device=slots.position.device
        ).view(1, 1, -1, 1)
        return torch.arange(max(after), device=last.device) <= last


class EveryKey(OwnKeys):
    """Routed tokens attend to every real token of their row up to themselves.

    Args:
        keys, values: [B, H, S, E], of all positions seen so far.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def for_slots(self, slots: Slots) -> "EveryKey":
        if slots.rows is None:
            return self
        return EveryKey(self.keys.index_select(0, slots.rows), self.values.index_select(0, slots.rows))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention; the slots' own keys are among those that are here already."""
        return self.keys, self.values

    def visible(self, slots: Slots, frame: Any) -> Tensor:
        at = (slots.position + frame.past).unsqueeze(-1)
        positions = torch.arange(self.keys.shape[2], device=at.device)
        visible = positions <= at
        if frame.seen is not None:
            seen = frame.seen if slots.rows is None else frame.seen.index_select(0, slots.rows)
            # A free slot may hold padding: it sees itself, lest its softmax be empty and its gradient NaN.
            visible = visible & (seen.unsqueeze(1) | (positions == at))
        return visible.unsqueeze(1)
