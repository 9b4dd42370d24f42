"""The key/value cache of a routed model: a routed layer keeps the tokens it routed, and no others.

Rows differ in how many tokens they store. Each row's tokens lie at the front of its slots in position order. The device
knows how many they are; the host knows a bound, and asks (`count`) where that is free or the bound is too high.
`get_seq_length()` answers in positions (tokens seen), not in stored keys: masks, rotary positions and cropping follow
the text.

Shape suffixes: B rows, H key/value heads, S positions seen, N slots, K new slots, E size of a head.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .static import StaticLayerCache, StaticState, static_layers

CACHE_NAME = "cache" if "cache" in signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
"""What Transformers calls a cache in arguments and outputs: 5.24 renamed `past_key_values`; users may say either."""

_SPARE_SLOTS = 31
"""Slots for tokens to come, whenever a layer needs more: what is stored is copied for every 32nd token only."""


class SurpriseHistory:
    """Changes of rows, common to all layers; and for the thesis's score D_st of every position, 4 bytes each."""

    keys: Tensor | None
    values: Tensor | None
    surprise: Tensor | None = None
    """float32 [B, S]."""

    def extend_surprise(self, static: Tensor) -> Tensor:
        """Append D_st of new tokens [B, T]; return D_st of all tokens [B, S + T]."""
        past = self.surprise
        self.surprise = static.detach() if past is None else torch.cat([past, static.detach()], dim=1)
        return self.surprise

    def _map(self, change: Any) -> None:
        """Apply a change of rows to everything."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        self._map_surprise(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def _map_surprise(self, change: Any) -> None:
        if self.surprise is not None:
            self.surprise = change(self.surprise)

    @property
    def surprise_nbytes(self) -> int:
        return 0 if self.surprise is None else self.surprise.nbytes


class FullLayerCache(SurpriseHistory, DynamicLayer):
    """A layer that keeps every token: a dense one, or a routed one with `kv_tokens = "all"`."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and surprise."""
        stored = [x.nbytes for x in (self.keys, self.values) if x is not None]
        return sum(stored) + self.surprise_nbytes

    def reset(self) -> None:
        self.keys = self.values = self.surprise = None
        self.is_initialized = False  # Transformers 5.17 would keep the length and write zeros
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._map_surprise(lambda x: x[:, :tokens_to_remove])


class RoutedLayerCache(SurpriseHistory, CacheLayerMixin):
    """Keys and values of the tokens that a layer routed.

    Attributes:
        keys, values: [B, H, N, E]; row b uses the first stored[b] slots.
        stored: int64 [B], on the device; made with the first positions.
        most: no row stores more than this, as far as the host knows.
        even: every row stores as many, as the host knows.
    """

    stored: Tensor

    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.most, self.even = 0, True
        self._parts: list[Tensor] = []

    @property
    def lacks_slots(self) -> bool:
        """Whether one token more may be too many for what is allocated, as far as the host knows."""
        return self.keys is not None and self.most >= self.keys.shape[2]

    @property
    def entered(self) -> Tensor | None:
        """Which positions are stored, bool [B, S]. Joined on demand: decoding a token does not need it."""
        return torch.cat(self._parts, dim=1) if self._parts else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with these states, [B, H, K, E]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def advance(self, selected: Tensor) -> None:
        """Count new positions, bool [B, T], True where the token is being stored."""
        if not self._parts:
            self.stored = selected.new_zeros(len(selected), dtype=torch.long)
        self._parts.append(selected)
        if len(self._parts) > _SPARE_SLOTS:
            self._parts = [torch.cat(self._parts, dim=1)]

    def next_slots(self, width: int) -> Tensor:
        """Where the next tokens of each row go, int64 [B, width]."""
        return self.stored.unsqueeze(1) + torch.arange(width, device=self.stored.device)

    def place(self, keys: Tensor, values: Tensor, routed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store new tokens of all rows; returns all that may be stored, [B, H, N', E].

        Args:
            keys, values: [B, H, K, E].
            routed: bool [B, K], which of them are stored: the first ones of each row; None: all.
        """
        width = keys.shape[2]
        # What lies in free slots is overwritten before any mask shows it.
        if self.most == 0:
            self.lazy_initialization(keys, values)
            kept_keys, kept_values = keys, values
        else:
            kept_keys, kept_values = self.reserve(self.most + width)
            slots = self.next_slots(width).view(-1, 1, width, 1)
            kept_keys.scatter_(2, slots.expand_as(keys), keys)
            kept_values.scatter_(2, slots.expand_as(values), values)
        self.stored = self.stored + (width if routed is None else routed.sum(1))
        self.most, self.even = self.most + width, self.even and routed is None
        return kept_keys[:, :, : self.most], kept_values[:, :, : self.most]

    def reserve(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values with at least this many slots and some to come, in tensors that may be written to."""
        assert self.keys is not None
        assert self.values is not None
        missing = slots - self.keys.shape[2]
        locked = torch.is_grad_enabled() or (self.keys.is_inference() and not torch.is_inference_mode_enabled())
        if missing > 0 or locked:
            more = missing + _SPARE_SLOTS if missing > 0 else 0
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        return self.keys, self.values

    def positions(self, count: int) -> Tensor:
        """Where the first stored tokens of each row stand in the text, int64 [B, count]; anything for free slots."""
        entered = self.entered
        assert entered is not None, "`advance` comes first"
        order = entered.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        missing = max(0, count - order.shape[1])
        return torch.nn.functional.pad(order, (0, missing))[:, :count]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a routed layer stores the tokens it routed through `place`")

    def get_seq_length(self) -> int:
        return sum(part.shape[1] for part in self._parts)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tokens' keys and values, the record of who entered, and surprise."""
        entered = self.entered
        if entered is None:
            return 0
        stored = 0
        if self.keys is not None and self.values is not None:
            stored = int(entered.sum()) * self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3])
            stored *= self.keys.element_size()
        return stored + entered.nbytes + self.surprise_nbytes

    def _set_entered(self, entered: Tensor) -> None:
        self._parts, self.stored, self.even = [entered], entered.sum(1), False

    def _map(self, change: Any) -> None:
        super()._map(change)
        if (entered := self.entered) is not None:
            self._set_entered(change(entered))

    def reset(self) -> None:
        self.keys = self.values = self.surprise = None
        self._parts, self.most, self.even, self.is_initialized = [], 0, True, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; their number is negative, as in Transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number of positions to remove")
        if tokens_to_remove == 0 or (entered := self.entered) is None:
            return
        self._set_entered(entered[:, :tokens_to_remove])
        self._map_surprise(lambda x: x[:, :tokens_to_remove])


class RoutedCache(Cache):
    """One layer cache for each layer of a routed model, made by the model itself.

    Works in `generate` with sampling, beams, left padding and assisted decoding; `crop`, `reorder_cache`,
    `batch_repeat_interleave`, `batch_select_indices` and `reset` as for any Transformers cache.

    Args:
        config: of the model.
        length: positions, prompt included, that decoding in fixed shapes is to hold (`static`); None: it grows.

    Raises:
        ValueError: this model cannot decode in fixed shapes: `layerdrop`, keys of routed tokens alone, the thesis's
            score, which remembers earlier tokens.
    """

    static: StaticState | None = None
    """The state of a cache that has fixed shapes by now."""

    def __init__(self, config: Any, length: int | None = None) -> None:
        if length is not None and (not config.keeps_every_key or config.needs_decision_layers):
            raise ValueError(
                "a static cache takes an architecture that routes tokens, kv_tokens = 'all' and a score of "
                "the token alone, such as 'forecast_error'; leave the length, or cache_implementation = 'static', out"
            )
        self.length = length
        routed = set(config.routed_layer_indices) if not config.keeps_every_key else set()
        super().__init__(
            layers=[RoutedLayerCache() if i in routed else FullLayerCache() for i in range(config.num_hidden_layers)]
        )

    def count(self, syncs: bool) -> None:
        """Ask the device how many tokens the layers store, and make slots for some more.

        As far as the host knows, every slot that is placed could be a stored token; after 31 tokens it has to ask.

        Args:
            syncs: whether asking is free; else only where a layer may have no slot left.
        """
        stores = [layer for layer in self.layers if isinstance(layer, RoutedLayerCache) and layer.keys is not None]
        if not any(not store.even and (syncs or store.lacks_slots) for store in stores):
            return
        for store, counts in zip(stores, torch.stack([store.stored for store in stores]).tolist(), strict=True):
            store.most, store.even = max(counts), min(counts) == max(counts)
            store.reserve(store.most + _SPARE_SLOTS)

    def to_static(self, seen: Tensor | None) -> StaticState:
        """Give the keys and values so far their fixed places; nothing if they have them.

        Args:
            seen: bool [B, S], False for padding; None: there is none.

        Raises:
            ValueError: the cache is full.
        """
        seen_so_far = self.get_seq_length()
        if self.length is None or seen_so_far >= self.length:
            raise ValueError(f"the cache is made for {self.length} positions and all are taken: give it more")
        if self.static is None:
            self.layers, self.static = static_layers(self.layers, self.length, seen)
        return self.static

    def to_dynamic(self) -> None:
        """Let keys and values grow again, for several tokens at once; nothing if they do."""
        if self.static is None:
            return
        static: list[Any] = self.layers
        growing = [FullLayerCache() for _ in static]
        for layer, its in zip(growing, static, strict=True):
            layer.update(*(part.clone() for part in its.stored()))
        self.layers, self.static = [*growing], None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.static is not None and tokens_to_remove < 0:
            self.static.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.static is not None:
            self.static.filled.copy_(self.static.filled.index_select(0, beam_idx.to(self.static.filled.device)))

    def reset(self) -> None:
        self.to_dynamic()
        super().reset()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.to_dynamic()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.to_dynamic()
        super().batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys and values of the tokens each layer keeps, and what routing remembers of them."""
        kinds = (RoutedLayerCache, FullLayerCache, StaticLayerCache)
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, kinds))

    @property
    def routed_shares(self) -> dict[int, float]:
        """For each layer that keeps routed tokens alone, the share of the positions seen that it keeps."""
        return {
            index: int(layer.entered.sum()) / max(1, layer.entered.numel())
            for index, layer in enumerate(self.layers)
            if isinstance(layer, RoutedLayerCache) and layer.entered is not None
        }
