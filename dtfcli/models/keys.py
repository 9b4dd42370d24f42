"""Whose keys and values the routed tokens of a layer attend to, and the mask that goes with them.

    OwnKeys     of the routed tokens of the same forward pass (no cache)
    StoredKeys  the same, behind what the cache holds for their rows
    EveryKey    of all tokens, routed or not (`kv_tokens = "all"`)

The stock attention takes these objects for its cache and asks them for keys and values through `update`. A layer with
a sliding window sees so many positions back, routed or not: what counts is where tokens stand in the text, not in
which slot.

Shape suffixes: B rows, K slots, H key/value heads, S keys, E size of a head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache import RoutedLayerCache
from .context import StaticContext
from .slots import Slots


def as_mask(visible: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """Which keys each token may attend to, bool [B, 1, K, S], in the form that an attention implementation takes.

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

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with the keys and values of the slots, [B, H, K, E]; returns [B, H, S, E] each."""
        return keys, values

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        """Which keys each slot may attend to, bool [B, 1, K, S]; None: plain causal attention."""
        if not self.slides(context):
            return None
        position, slot = slots.position, torch.arange(slots.position.shape[1], device=slots.position.device)
        return self.within(position, position) & (slot <= slot.unsqueeze(-1))

    def slides(self, context: Any) -> bool:
        """Whether the window is shorter than the text so far."""
        return self.window is not None and self.window < context.past + context.shape[1]

    def within(self, position: Tensor, key_position: Tensor) -> Tensor:
        """Whether keys lie in the window of each token, bool [B, 1, K, S].

        Args:
            position: int64 [B, K], of the tokens.
            key_position: int64 [B, S] or [S], of the keys.
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
        routed: bool [B, K], which slots of the new tokens are not free; None: all.
    """

    store: RoutedLayerCache
    routed: Tensor | None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.place(keys, values, self.routed)

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        store, width, slides = self.store, slots.position.shape[1], self.slides(context)
        if not slides and (store.most == 0 or (store.even and width == 1)):
            return None
        stored = torch.arange(store.most + width, device=slots.position.device)
        visible = (stored <= store.next_slots(width).unsqueeze(-1)).unsqueeze(1)
        if slides:
            visible = visible & self.within(slots.position + context.past, store.positions(len(stored)))
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

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values  # the slots' own are among them

    def visible(self, slots: Slots, context: Any) -> Tensor | None:
        if isinstance(context, StaticContext):
            return context.visible(self.window)
        tokens, offered, slides = context.shape[1], self.offered, self.slides(context)
        if offered is None:
            offered = context.padding_mask
        if offered is None and slots.whole and not slides and (context.past == 0 or tokens == 1):
            return None  # each sees all keys up to its own
        position = slots.position + context.past
        key_position = torch.arange(self.keys.shape[2], device=position.device)
        visible = key_position <= position.unsqueeze(-1)
        if offered is not None:
            # A free slot may hold padding. It sees itself, or its softmax would be empty and its gradient NaN.
            visible = visible & (offered.unsqueeze(1) | (key_position == position.unsqueeze(-1)))
        visible = visible.unsqueeze(1)
        return visible & self.within(position, key_position) if slides else visible
