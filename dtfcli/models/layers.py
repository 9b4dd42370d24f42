"""The two kinds of layer around the backbone's own blocks.

Both are subclasses of the stock decoder layer, so that the backbone keeps its parameter names:

    routed layer     router → slots → block on the routed tokens → gated update;
                     tokens that skip pass by, or take a forecast of the update
    decision layer   dense block, then PriorFFN: observes how surprising each token was (`surprise`)

Layers return flat tuples of tensors, hidden states first: gradient checkpointing runs a forward twice, so nothing may
be recorded on the side.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache import CACHE_NAME
from .context import RoutingContext
from .forecast import Forecast, KnownUpdates, RegressionTargets, regression_targets
from .keys import EveryKey, OwnKeys, StoredKeys
from .router import TopKPredictor
from .routers import router_of
from .routing import Scores, gated_update, select_explored, select_threshold, select_topk, topk_capacity
from .slots import Slots, assign_slots, every_slot, gather_tokens, scatter_tokens
from .static import EnteredRows
from .stock import StockLayer
from .surprise import PriorFFN, Surprise, surprise


class LayerInputs(NamedTuple):
    """What the routed part of a layer works on."""

    hidden_states: Tensor
    """[B, T, D], of all tokens."""
    keys: OwnKeys
    """The keys that entering tokens attend to."""
    position_embeddings: tuple[Tensor, Tensor]
    more: dict[str, Any]
    """What else the stock attention takes."""


class DecisionLayerMixin(StockLayer):
    """A dense decoder layer that also observes how surprising each token was to it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.prior = PriorFFN(config)
        self.prior_input_gradient = config.prior_input_gradient

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Surprise:
        """[B, T, D] → posterior [B, T, D]; D_st, D_ch, prior error: float32 [B, T]."""
        posterior = super().forward(hidden_states, **kwargs)
        guess = self.prior(hidden_states if self.prior_input_gradient else hidden_states.detach())
        return surprise(hidden_states, posterior, guess, self.prior_input_gradient)


class RoutedLayerMixin(StockLayer):
    """A decoder layer that only some tokens enter.

    Attributes:
        first_norm: name of the norm before attention; None: there is none.
        window: positions that attention reaches back, its own included; None: all.
    """

    first_norm: str | None

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.window = config.window(layer_idx)
        self.router = router_of(config, layer_idx)
        self.forecast = Forecast(config) if config.has_forecast else None
        self.predictor = TopKPredictor(config) if config.has_predictor else None

    def rank(
        self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any
    ) -> tuple[Tensor, Scores, Tensor | None]:
        """What is compared with thresholds, float32 [B, T]; the router's scores; the predictor's logits, if used."""
        device = hidden_states.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            scores = self.router(hidden_states, below, context, store)
        logits = None
        if self.predictor is not None and (self.training or context.mode == "predictor"):
            logits = self.predictor(hidden_states)
        if context.mode == "predictor":
            assert logits is not None, "`set_routing` refuses this mode without a predictor"
            return logits, scores, logits
        return scores.score, scores, logits

    def capacity(self, context: RoutingContext) -> float:
        """γ in this pass. A compiled layer that reads its own index serves no other: where γ is shared, none does."""
        shared = context.shared_capacity
        return context.capacities[self.layer_idx] if shared is None else shared

    def select(self, ranked: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """Which tokens enter, bool [B, T]; the threshold of a causal mode, 0-d."""
        if context.chosen and self.layer_idx in context.chosen:
            return context.chosen[self.layer_idx], None
        sinks = context.sinks if self.router.by_token else None
        if context.mode == "topk":
            return select_topk(ranked, self.capacity(context), context.is_token, sinks), None
        threshold = context.thresholds[self.layer_idx]
        # A checkpointed layer's outputs become part of its graph; the threshold it will recompute with must not.
        return select_threshold(ranked, threshold, context.is_token, sinks), threshold.detach()

    def slots(self, selected: Tensor, context: RoutingContext) -> tuple[Slots | None, int | None]:
        """Where the tokens that enter sit, None if there are none; how many they are, None if only the device knows.

        `topk` never synchronizes with the device: every row has the same number of slots. A causal mode synchronizes
        once, because its number of slots depends on the scores; at γ = 0, at γ = 1 and where the context forbids it, it
        does not. Its rows have as many slots as the fullest of them needs. Training never goes without any slot: every
        process of a distributed run has to enter every layer.
        """
        (rows, tokens), capacity = context.shape, self.capacity(context)
        if capacity == 0.0:
            return None, 0
        if capacity == 1.0 and context.is_token is None:
            return every_slot(rows, tokens, context.device), rows * tokens
        if context.mode == "topk":
            width = topk_capacity(capacity, tokens)
            slots = assign_slots(selected, width)
            return (slots, None) if context.is_token is not None else (slots._replace(routed=None), rows * width)
        if not context.syncs:
            return assign_slots(selected, tokens), None
        # The one synchronization. A sum of one column would be an operation for nothing.
        counts = [int(row[0]) for row in selected.tolist()] if tokens == 1 else selected.sum(1).tolist()
        width = max(counts) or int(self.training)
        if width == 0:
            return None, 0
        if min(counts) == tokens:
            return every_slot(rows, tokens, context.device), rows * tokens
        slots = assign_slots(selected, width)
        return slots._replace(routed=None) if min(counts) == width else slots, sum(counts)

    def forward(
        self,
        hidden_states: Tensor,
        *below: Tensor,
        context: RoutingContext,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Route, process, write back.

        Args:
            hidden_states: [B, T, D].
            below: what the decision layer below observed, float32 [B, T] each; none without one.
            context: of this pass.
            position_embeddings: cos, sin of the original positions, [B or 1, T, head dim].
            attention_mask: of the dense layers; slots have their own.
            kwargs: among them, as `CACHE_NAME`, the model's cache; this layer's own part of it grows.

        Returns:
            Hidden states [B, T, D], and the fields of a `RoutingRecord` after the layer's index, flat.
        """
        cache = kwargs.pop(CACHE_NAME, None)
        store = None if cache is None else cache.layers[self.layer_idx]
        ranked, scores, logits = self.rank(hidden_states, below, context, store)
        selected, threshold = self.select(ranked, context)
        slots, count = self.slots(selected, context)
        keys = self._keys(hidden_states, position_embeddings, selected, slots, store)
        inputs = LayerInputs(hidden_states, keys, position_embeddings, kwargs)
        updated = skipped = self.skip(hidden_states, selected, count)
        known = []
        if slots is not None:
            x_BKD, processed = self._processed(slots, inputs, context)
            gate_BK = gather_tokens(scores.gate.unsqueeze(-1), slots).squeeze(-1)
            skipped_BKD = x_BKD if skipped is hidden_states else gather_tokens(skipped, slots)
            y_BKD = gated_update(skipped_BKD, processed, gate_BK, self.config.gate)
            if slots.routed is not None:
                y_BKD = torch.where(slots.routed.unsqueeze(-1), y_BKD, skipped_BKD)
            updated = scatter_tokens(skipped, slots, y_BKD)
            known.append(KnownUpdates(slots, x_BKD, processed))
        learns = self.training and self.config.learns_from_updates
        targets = self._targets(known, selected, inputs, context) if learns else RegressionTargets()
        observed = [each.detach() for each in below] if below else [None, None]
        shown = _of_all_tokens(hidden_states, known) if context.shows_updates else ()
        return updated, ranked, selected, threshold, *scores[1:], logits, *observed, *targets, *shown

    def skip(self, x: Tensor, selected: Tensor, count: int | None) -> Tensor:
        """What tokens are without the routed part: x, or x + f(x) with a forecast; [B, T, D].

        Tokens that enter need it for the gate alone: its gradient, or with a soft gate its value.

        Args:
            x: [B, T, D].
            selected: bool [B, T].
            count: how many are selected; None: the host does not know.
        """
        if self.forecast is None:
            return x
        gated = self.config.gate == "soft" and not self.config.learns_scores
        if self.training or gated or count is None:
            return x + self.forecast(x)
        if count == selected.numel():
            return x
        flat = x.flatten(0, 1)
        places = torch.nonzero_static(~selected.flatten(), size=selected.numel() - count).squeeze(1)
        skipping = flat.index_select(0, places)
        return flat.index_copy(0, places, (skipping + self.forecast(skipping)).to(x.dtype)).view_as(x)

    def _processed(self, slots: Slots, inputs: LayerInputs, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """What the tokens of some slots are before and after the routed part, [B, K, D] each."""
        x_BKD = gather_tokens(inputs.hidden_states, slots)
        with EnteredRows(slots.routed) if context.triton_kernels and slots.routed is not None else nullcontext():
            cos, sin = (gather_tokens(part, slots) for part in inputs.position_embeddings)
            return x_BKD, super().forward(
                x_BKD,
                attention_mask=inputs.keys.mask(x_BKD, slots, context, self.config),
                position_embeddings=(cos, sin),
                **{CACHE_NAME: inputs.keys},
                **inputs.more,
            )

    def _targets(
        self, known: list[KnownUpdates], selected: Tensor, inputs: LayerInputs, context: RoutingContext
    ) -> RegressionTargets:
        """What the known updates teach: those of the tokens that entered, and of some that are explored."""
        weight, tokens = selected.float(), context.shape[1]
        skipping = tokens - topk_capacity(self.capacity(context), tokens)
        count = round(self.config.explore * skipping)
        if context.noise is not None and count:
            explored, stands_for = select_explored(context.noise, selected, count, context.is_token, context.sinks)
            known = [*known, self._explored_update(assign_slots(explored, count), selected, inputs, context)]
            weight = torch.where(explored, stands_for, weight)
        if context.sinks is not None:
            weight = weight.masked_fill(context.sinks, 0.0)
        return regression_targets(known, weight, self.forecast, self.router)

    @torch.no_grad()
    def _explored_update(
        self, slots: Slots, selected: Tensor, inputs: LayerInputs, context: RoutingContext
    ) -> KnownUpdates:
        """The update of tokens that skip: each attends to the tokens that entered and to itself."""
        if not self.config.keeps_every_key:
            keys = self._all_keys(inputs.hidden_states, inputs.position_embeddings)
            offered = selected if self.router.by_token else None
            inputs = inputs._replace(keys=EveryKey(*keys, offered, window=self.window))
        return KnownUpdates(slots, *self._processed(slots, inputs, context))

    def _all_keys(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [B, H, T, E] each."""
        attention = self.self_attn
        normed = x if self.first_norm is None else getattr(self, self.first_norm)(x)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        keys, values = attention.k_proj(normed), attention.v_proj(normed).view(shape).transpose(1, 2)
        norm = getattr(attention, "k_norm", None)
        if norm is not None and norm.weight.numel() == keys.shape[-1]:  # of all heads together, as in OLMo 2
            keys = norm(keys).view(shape)
        else:
            keys = keys.view(shape) if norm is None else norm(keys.view(shape))
        keys = keys.transpose(1, 2)
        if getattr(attention, "use_rope", True):  # some layers of SmolLM3 have no positions
            keys = apply_rotary_pos_emb(keys, keys, *position_embeddings)[1]
        return keys, values

    def _keys(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], selected: Tensor, slots: Slots | None, store: Any
    ) -> OwnKeys:
        """Whose keys and values the routed tokens attend to; what the cache keeps is kept here."""
        if self.config.keeps_every_key:
            keys, values = self._all_keys(x, position_embeddings)
            return EveryKey(*((keys, values) if store is None else store.update(keys, values)), window=self.window)
        if store is None:
            return OwnKeys(window=self.window)
        store.advance(selected)
        return StoredKeys(store, None if slots is None else slots.routed, window=self.window)


def _of_all_tokens(x: Tensor, known: list[KnownUpdates]) -> tuple[Tensor, Tensor]:
    """Before and after the routed part, [B, T, D] each; tokens that are in no slot stay as they are."""
    after = x
    for slots, before, processed in known:
        if slots.routed is not None:
            processed = torch.where(slots.routed.unsqueeze(-1), processed, before)
        after = scatter_tokens(after, slots, processed)
    return x, after
