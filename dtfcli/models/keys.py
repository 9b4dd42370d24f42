"""Whose keys and values the routed tokens of a layer attend to, and the mask that goes with them.

    OwnKeys     of the routed tokens of the same forward pass (no cache)
    StoredKeys  the same, behind what the cache holds for their rows
    PlacedKeys  the same, without looking at the device: for all rows, with a mask for what they do not store
    EveryKey    of all tokens, routed or not (`kv_tokens = "all"`)

The stock attention takes these objects for its cache and asks them for keys and values through `update`. A layer with
a sliding window sees so many positions back, routed or not: what counts is where tokens stand in the text, not in
which slot.

Shape suffixes: R rows that route something, K slots, H key/value heads, S keys, E size of a head.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache import RoutedLayerCache
from .context import StaticContext
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


@dataclass(frozen=True)
class OwnKeys:
    """Routed tokens attend to each other. They fill their slots in position order: plain causal attention serves.

    Attributes:
        window: positions that a token attends to, its own included; None: all before it.
    """

    window: int | None = field(default=None, kw_only=True)

    def of_rows(self, rows: list[int], slots: Slots) -> "OwnKeys":
        """Those that the rows of a group attend to."""
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with the keys and values of the slots, [R, H, K, E]; returns [R, H, S, E] each."""
        return keys, values

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        """Which keys each slot may attend to, bool [R, 1, K, S]; None: plain causal attention."""
        if not self.slides(context):
            return None
        position, slot = slots.position, torch.arange(slots.position.shape[1], device=slots.position.device)
        return self.within(position, position) & (slot <= slot.unsqueeze(-1))

    def slides(self, context: Any) -> bool:
        """Whether the window is shorter than the text so far."""
        return self.window is not None and self.window < context.past + context.shape[1]

    def within(self, position: Tensor, key_position: Tensor) -> Tensor:
        """Whether keys lie in the window of each token, bool [R, 1, K, S].

        Args:
            position: int64 [R, K], of the tokens.
            key_position: int64 [R, S] or [S], of the keys.
        """
        assert self.window is not None, "`slides` said so"
        return (key_position.unsqueeze(-2) > position.unsqueeze(-1) - self.window).unsqueeze(1)

    def mask(self, hidden_states: Tensor, slots: Slots, context: Any, config: Any) -> Tensor | None:
        """The attention mask in the form that the configured attention implementation takes.

        Raises:
            ValueError: flash or flex attention would need a mask that it cannot take.
        """
        visible, implementation = self.visible(slots, context), config._attn_implementation
        if visible is None:
            if implementation == "sdpa":
                return None
            return create_causal_mask(config, hidden_states, None, None)
        return as_mask(visible, hidden_states.dtype, implementation)


@dataclass(frozen=True)
class StoredKeys(OwnKeys):
    """Routed tokens attend to the stored ones of their row and to each other, and are stored themselves.

    Attributes:
        store: the layer's part of the cache, which knows already which of the new positions are routed.
        counts: new routed tokens of each row of the batch.
        rows: the rows of a group.
    """

    store: RoutedLayerCache
    counts: list[int]
    rows: list[int] = field(default_factory=list)

    def of_rows(self, rows: list[int], slots: Slots) -> "StoredKeys":
        return replace(self, rows=rows)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.append(keys, values, self.rows, [self.counts[row] for row in self.rows])

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        before = [self.store.counts[row] for row in self.rows]
        after = [self.store.counts[row] + self.counts[row] for row in self.rows]
        width, device, slides = slots.position.shape[1], slots.position.device, self.slides(context)
        if not slides and (not any(before) or (width == 1 and min(after) == max(after))):
            return None
        last_RK = torch.tensor(before, device=device).unsqueeze(1) + torch.arange(width, device=device)
        visible = (torch.arange(max(after), device=device) <= last_RK.unsqueeze(-1)).unsqueeze(1)
        if slides:
            stored = self.store.positions(max(after))[torch.tensor(self.rows, device=device)]
            visible = visible & self.within(slots.position + context.past, stored)
        return visible


@dataclass(frozen=True)
class PlacedKeys(OwnKeys):
    """As `StoredKeys`, for all rows at once, where only the device knows how many tokens each of them stores.

    Attributes:
        store: as there.
        routed: bool [B, K], which slots of the tokens that come are not free.
    """

    store: RoutedLayerCache
    routed: Tensor | None = None

    def of_rows(self, rows: list[int], slots: Slots) -> "PlacedKeys":
        return replace(self, routed=slots.routed)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.routed is not None, "without a look, any slot may be free"
        return self.store.place(keys, values, self.routed)

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        if self.store.most == 0 and not self.slides(context):
            return None
        width, device = slots.position.shape[1], slots.position.device
        last_BK = self.store.stored.unsqueeze(1) + torch.arange(width, device=device)
        count = self.store.most + width
        visible = (torch.arange(count, device=device) <= last_BK.unsqueeze(-1)).unsqueeze(1)
        if self.slides(context):
            visible = visible & self.within(slots.position + context.past, self.store.positions(count))
        return visible


@dataclass(frozen=True)
class EveryKey(OwnKeys):
    """Routed tokens attend to every real token of their row up to themselves, or to some and to themselves.

    Attributes:
        keys, values: [B, H, S, E], of all positions seen so far.
        offered: bool [B, S], whose keys are offered to others; None: those of all real tokens.
    """

    keys: Tensor
    values: Tensor
    offered: Tensor | None = None

    def of_rows(self, rows: list[int], slots: Slots) -> "EveryKey":
        if slots.rows is None:
            return self
        keys, values = (part.index_select(0, slots.rows) for part in (self.keys, self.values))
        offered = None if self.offered is None else self.offered.index_select(0, slots.rows)
        return replace(self, keys=keys, values=values, offered=offered)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values  # the slots' own are among them

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        if isinstance(context, StaticContext):
            return context.visible(self.window)
        tokens, offered, slides = context.shape[1], self.offered, self.slides(context)
        if offered is None and context.padding_mask is not None:
            offered = context.padding_mask if slots.rows is None else context.padding_mask.index_select(0, slots.rows)
        every_token = (slots.routed is None or tokens == 1) and slots.position.shape[1] == tokens
        if offered is None and every_token and not slides and (context.past == 0 or tokens == 1):
            return None  # each sees all keys up to its own
        position = slots.position + context.past
        key_position = torch.arange(self.keys.shape[2], device=position.device)
        visible = key_position <= position.unsqueeze(-1)
        if offered is not None:
            # A free slot may hold padding. It sees itself, or its softmax would be empty and its gradient NaN.
            visible = visible & (offered.unsqueeze(1) | (key_position == position.unsqueeze(-1)))
        visible = visible.unsqueeze(1)
        return visible & self.within(position, key_position) if slides else visible
