"""The two kinds of layer around the backbone's own blocks.

Both are subclasses of the stock decoder layer, so that the backbone keeps its parameter names:

    decision layer   dense block, then PriorFFN: hands D_st, D_ch upwards (DTF)
    routed layer     router → slots → block on the routed tokens → gated update

Layers return flat tuples of tensors, hidden states first: gradient checkpointing runs a forward twice, so nothing may
be recorded on the side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache import CACHE_NAME
from .keys import EveryKey, OwnKeys, StoredKeys
from .routers import ROUTERS, Predictor, PriorFFN, RoutingFrame
from .routing import Scores, Surprise, gated_update, select_threshold, select_topk, surprise, topk_capacity
from .slots import Slots, assign_group, assign_slots, every_slot, gather_tokens, row_groups, scatter_tokens
from .stock import StockLayer


class RoutedOutput(NamedTuple):
    """What a routed layer returns. Checkpointing and hooks may hand it on as a plain tuple."""

    hidden_states: Tensor
    """[B, T, D]."""
    ranked: Tensor
    """float32 [B, T], what is compared with thresholds: scores, or in `predictor` mode the predictor's logits."""
    selected: Tensor
    """bool [B, T], True where the token entered."""
    threshold: Tensor | None
    """float32, 0-d; None: top-K."""
    gate: Tensor
    """float32 [B, T], G (DTF), σ(r) or r (MoD)."""
    s_ce: Tensor | None
    s_cu: Tensor | None
    """float32 [B, T], the criteria (DTF)."""
    predictor_logits: Tensor | None
    """float32 [B, T], while a predictor trains or routes."""


class DecisionLayerMixin(StockLayer):
    """A dense decoder layer that also says how surprising each token was to it."""

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
    """A decoder layer that only some tokens enter."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.by_surprise = config.architecture == "dtf"  # not by the router's class: peft may have wrapped it
        self.router = ROUTERS[config.architecture](config, layer_idx)
        self.predictor = Predictor(config) if config.has_predictor else None

    def score(
        self, hidden_states: Tensor, surprises: tuple[Tensor, ...], frame: RoutingFrame, store: Any = None
    ) -> Scores:
        """The router's scores in float32; `surprises` is (D_st, D_ch) for DTF, () for MoD."""
        if not self.by_surprise:
            return self.router(hidden_states)
        static, change = surprises
        history = static if store is None else store.extend_surprise(static)
        return self.router(static, change, history, frame)

    def rank(
        self, hidden_states: Tensor, surprises: tuple[Tensor, ...], frame: RoutingFrame, store: Any = None
    ) -> tuple[Tensor, Scores, Tensor | None]:
        """What is compared with thresholds, float32 [B, T]; the router's scores; the predictor's logits, if used."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                scores = self.score(hidden_states, surprises, frame, store)
        else:
            scores = self.score(hidden_states, surprises, frame, store)
        logits = None
        if self.predictor is not None and (self.training or frame.mode == "predictor"):
            logits = self.predictor(hidden_states)
        if frame.mode == "predictor":
            assert logits is not None, "`set_routing` refuses this mode without a predictor"
            return logits, scores, logits
        return scores.score, scores, logits

    def select(self, ranked: Tensor, frame: RoutingFrame, capacity: float) -> tuple[Tensor, Tensor | None]:
        """Which tokens enter, bool [B, T]; the threshold of a causal mode, 0-d."""
        if frame.chosen is not None and self.layer_idx in frame.chosen:
            return frame.chosen[self.layer_idx], None
        if not self.router.by_token:
            everyone = torch.ones_like(ranked, dtype=torch.bool) if frame.real is None else frame.real
            chosen = everyone if capacity else torch.zeros_like(everyone)
            return chosen, None if frame.mode == "topk" else self.router.threshold(frame.mode, capacity)
        if frame.mode == "topk":
            return select_topk(ranked, capacity, frame.real, frame.sinks), None
        if frame.thresholds is not None:
            threshold = frame.thresholds[self.layer_idx]
        else:
            threshold = self.router.threshold(frame.mode, capacity, frame.column)
        # A checkpointed layer's outputs become part of its graph; the threshold it will recompute with must not.
        return select_threshold(ranked, threshold, frame.real, frame.sinks), threshold.detach()

    def groups(
        self, selected: Tensor, frame: RoutingFrame, capacity: float
    ) -> tuple[list[tuple[list[int], Slots]], list[int]]:
        """Rows that go through the block together, with their slots; and how many tokens of each row enter.

        `topk` never waits for the device: every row has the same number of slots. A causal mode looks once, because
        its number of slots depends on the scores; at γ = 0 and γ = 1 it does not. While training all rows go together,
        and never without any slot: every process of a distributed run has to enter every layer. Rows and counts are
        empty if not looked at.
        """
        rows, tokens = frame.shape
        if capacity == 0.0:
            return [], [0] * rows
        if capacity == 1.0 and frame.real is None:
            return [(list(range(rows)), every_slot(rows, tokens, frame.device))], [tokens] * rows
        if frame.mode == "topk":
            width = topk_capacity(capacity, tokens)
            slots = assign_slots(selected, width)
            return [([], slots if frame.real is not None else slots._replace(routed=None))], []  # K of T, in every row
        if self.training:
            return [([], assign_slots(selected, max(1, int(selected.sum(1).max()))))], []
        # The one look at the device. A sum of one column would be an operation for nothing.
        counts = [int(row[0]) for row in selected.tolist()] if selected.shape[1] == 1 else selected.sum(1).tolist()
        rows_together = row_groups(counts)
        return [(rows, assign_group(selected, rows, [counts[row] for row in rows])) for rows in rows_together], counts

    def forward(
        self,
        hidden_states: Tensor,
        *surprises: Tensor,
        frame: RoutingFrame,
        capacity: float,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> RoutedOutput:
        """Route, process, write back.

        Args:
            hidden_states: [B, T, D].
            surprises: D_st, D_ch of the decision layer below, float32 [B, T] (DTF); none (MoD).
            frame: mode, padding and sinks of this pass.
            capacity: γ of this layer in this pass.
            position_embeddings: cos, sin of the original positions, [B or 1, T, head dim].
            attention_mask, position_ids: unused; the slots have their own.
            kwargs: among them, as `CACHE_NAME`, the model's cache; this layer's own part of it grows.
        """
        cache = kwargs.pop(CACHE_NAME, None)
        store = None if cache is None else cache.layers[self.layer_idx]
        ranked, scores, logits = self.rank(hidden_states, surprises, frame, store)
        selected, threshold = self.select(ranked, frame, capacity)
        groups, counts = self.groups(selected, frame, capacity)
        all_keys = self._keys(hidden_states, position_embeddings, selected, counts, store)
        for rows, slots in groups:
            x_RKD = gather_tokens(hidden_states, slots)
            keys = all_keys.of_rows(rows, slots)
            cos, sin = (gather_tokens(part, slots) for part in position_embeddings)
            processed = super().forward(
                x_RKD,
                attention_mask=keys.mask(x_RKD, slots, frame, self.config),
                position_embeddings=(cos, sin),
                **{CACHE_NAME: keys.as_cache},
                **kwargs,
            )
            gate_RK = gather_tokens(scores.gate.unsqueeze(-1), slots).squeeze(-1)
            updated = gated_update(x_RKD, processed, gate_RK, self.config.gate)
            if slots.routed is not None:
                updated = torch.where(slots.routed.unsqueeze(-1), updated, x_RKD)
            hidden_states = scatter_tokens(hidden_states, slots, updated)
        return RoutedOutput(hidden_states, ranked, selected, threshold, scores.gate, scores.s_ce, scores.s_cu, logits)

    def _keys(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        selected: Tensor,
        counts: list[int],
        store: Any,
    ) -> OwnKeys:
        """Whose keys and values the routed tokens attend to; what the cache keeps is kept here."""
        if self.config.keeps_every_key:
            attention = self.self_attn
            normed = self.input_layernorm(hidden_states)
            shape = (*normed.shape[:-1], -1, attention.head_dim)
            keys = attention.k_proj(normed).view(shape).transpose(1, 2)
            values = attention.v_proj(normed).view(shape).transpose(1, 2)
            _, keys = apply_rotary_pos_emb(keys, keys, *position_embeddings)
            return EveryKey(*((keys, values) if store is None else store.update(keys, values)))
        if store is None:
            return OwnKeys()
        store.advance(selected)
        return StoredKeys(store, counts)
