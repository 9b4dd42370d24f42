"""How a batch enters the stack: positions, masks, rotary embeddings, and what its routed layers share.

Masks and rotary embeddings are made once for each kind of attention there is (with and without a sliding window), by
Transformers where that does not make the host wait.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .cache import CACHE_NAME, RoutedCache
from .configuration_fields import CAUSAL_MODES
from .keys import as_mask
from .outputs import RoutingRecord
from .routers import Router, RoutingFrame, TokenFrame
from .routing import slots_per_row
from .stock import StockStack


@dataclass
class Pass:
    """One batch on its way through the stack."""

    hidden_states: Tensor
    frame: RoutingFrame
    layer_inputs: dict[str, dict[str, Any]]
    """What layers take besides hidden states, by the kind of their attention."""
    positions: Tensor
    surprises: tuple[Tensor, ...] = ()
    prior_errors: list[Tensor] = field(default_factory=list)
    records: list[RoutingRecord] = field(default_factory=list)


class EntranceMixin(StockStack):
    """The part of the stack that a batch meets first; the rest of it is `DynamicModelMixin`."""

    rotary_by_kind = False
    """Whether rotary embeddings differ with the kind of attention, as in Gemma 3."""
    triton_kernels: bool
    routed: tuple[int, ...]
    kinds: tuple[str, ...]
    routers: Mapping[int, Router]
    mode: str
    explores: bool
    capacities: Callable[[], Mapping[int, float]]

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RoutedCache | None = None,
        looks: bool = True,
    ) -> Pass:
        """A batch [B, T, D] before its first layer. Positions count real tokens, so padding shifts nothing.

        Args:
            inputs_embeds, attention_mask, position_ids, cache: as of `forward`.
            looks: whether routed layers may look at how many tokens enter; else `_holds` says if that went well.
        """
        (batch, tokens), device = inputs_embeds.shape[:2], inputs_embeds.device
        past = 0 if cache is None else cache.get_seq_length()
        seen = None if attention_mask is None else attention_mask.bool().to(device)
        if cache is not None and cache.length is not None:
            if tokens == 1 and past:
                cache.to_static(None if seen is None else seen[:, :past])
                return self._enter_static(inputs_embeds, position_ids, cache)
            cache.to_dynamic()
        if seen is not None and self._has_no_padding(seen, tokens, looks):
            seen = None
        asked = position_ids
        if position_ids is None:
            position_ids = _positions(seen, past, tokens, device)
        capacities, slots = self.capacities(), None
        if not looks:
            slots = {i: slots_per_row(capacity, tokens, self.config.sink_tokens) for i, capacity in capacities.items()}
            if isinstance(cache, RoutedCache):
                cache.reserve()
        thresholds = None
        if self.training and self.mode in CAUSAL_MODES:
            # As they are now: tracking moves them before checkpointing runs the layers again.
            thresholds = {i: router.threshold(self.mode).clone() for i, router in self.routers.items()}
        return Pass(
            hidden_states=self._scaled(inputs_embeds),
            positions=position_ids,
            frame=RoutingFrame(
                config=self.config,
                mode=self.mode,
                shape=(batch, tokens),
                device=device,
                capacities=capacities,
                seen=seen,
                past=past,
                thresholds=thresholds,
                slots_per_row=slots,
                noise=torch.rand(batch, tokens, device=device) if self.training and self.explores else None,
            ),
            layer_inputs=self._inputs(
                inputs_embeds,
                position_ids,
                cache,
                lambda kind: self._mask(kind, inputs_embeds, seen, cache, asked, looks),
            ),
        )

    def _enter_static(self, inputs_embeds: Tensor, position_ids: Tensor | None, cache: RoutedCache) -> Pass:
        """A token of each row, [B, 1, D], on top of a static cache."""
        assert cache.static is not None, "`to_static` was called"
        filled = cache.static.filled.index_fill_(1, cache.static.position, True)
        if position_ids is None:
            position_ids = filled.sum(1, keepdim=True) - 1
        frame = TokenFrame(
            config=self.config,
            mode=self.mode,
            shape=(len(inputs_embeds), 1),
            device=inputs_embeds.device,
            capacities=self.capacities(),
            slots_per_row=dict.fromkeys(self.routed, 1),
            filled=filled,
            position=cache.static.position,
            triton_kernels=self.triton_kernels,
        )

        def mask(kind: str) -> Tensor:
            visible = frame.visible(self.config.sliding_window if kind == "sliding_attention" else None)
            return as_mask(visible, inputs_embeds.dtype, self.config._attn_implementation)

        layer_inputs = self._inputs(inputs_embeds, position_ids, cache, mask)
        return Pass(self._scaled(inputs_embeds), frame, layer_inputs, position_ids)

    def _scaled(self, inputs_embeds: Tensor) -> Tensor:
        """Embeddings as the first layer takes them; Granite scales them."""
        scale = getattr(self.config, "embedding_multiplier", None)
        return inputs_embeds if scale is None else inputs_embeds * scale

    def _inputs(
        self, inputs_embeds: Tensor, position_ids: Tensor, cache: RoutedCache | None, mask: Callable[[str], Any]
    ) -> dict[str, dict[str, Any]]:
        """What layers take besides hidden states, for each kind of attention there is."""
        inputs = {}
        for kind in set(self.kinds):
            by_kind = (kind,) if self.rotary_by_kind else ()
            embeddings = self.rotary_emb(inputs_embeds, position_ids, *by_kind)
            inputs[kind] = {"attention_mask": mask(kind), CACHE_NAME: cache, "position_embeddings": embeddings}
        return inputs

    def _has_no_padding(self, seen: Tensor, tokens: int, looks: bool) -> bool:
        """Whether a mask, bool [B, S + T], can be left out. `generate` always gives one, mostly for nothing.

        A causal mode that looks in every layer may look here, too, and one that does not before it starts. Of a row
        alone it is assumed (`_holds` sees whether that was right), and a single token takes its mask as it is.
        """
        if self.training or self.mode not in CAUSAL_MODES:
            return False
        if looks or (len(seen) > 1 and tokens > 1):
            return bool(seen.all())
        return tokens > 1

    def _mask(
        self,
        kind: str,
        inputs_embeds: Tensor,
        seen: Tensor | None,
        cache: RoutedCache | None,
        asked: Tensor | None,
        looks: bool,
    ) -> Any:
        """The attention mask of layers of a kind that are not routed."""
        slides = kind == "sliding_attention"
        if looks or seen is None or self.config._attn_implementation != "sdpa":
            # By place: Transformers 5.24 renamed the cache's argument. Without a mask it waits for the device to see
            # whether given positions begin again within a row: ours do not. With one, whether there is padding.
            create = create_sliding_window_causal_mask if slides else create_causal_mask
            return create(self.config, inputs_embeds, seen, cache, asked)
        positions = torch.arange(seen.shape[1], device=seen.device)
        new = positions[-inputs_embeds.shape[1] :, None]
        visible = positions <= new
        if slides:
            visible = visible & (positions > new - self.config.sliding_window)
        return (seen.unsqueeze(1) & visible).unsqueeze(1)


def _positions(seen: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor:
    """Of new tokens, int64 [B or 1, T]: real ones are counted from 0."""
    if seen is None:
        return torch.arange(past, past + tokens, device=device).unsqueeze(0)
    return (seen.long().cumsum(1) - 1).clamp(min=0)[:, past:]
