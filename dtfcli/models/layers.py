"""The two kinds of layer around the backbone's own blocks.

Both are subclasses of the stock decoder layer, so that the backbone keeps its parameter names:

    decision layer   dense block, then PriorFFN: hands D_st, D_ch upwards (DTF by surprise)
    routed layer     router → slots → block, MLP or attention on the routed tokens → gated update;
                     tokens that skip pass by, or take a forecast of the update

Layers return flat tuples of tensors, hidden states first: gradient checkpointing runs a forward twice, so nothing may
be recorded on the side.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache import CACHE_NAME
from .keys import EveryKey, OwnKeys, PlacedKeys, StoredKeys
from .learning import Known, Lesson, learn
from .priors import Forecast, PriorFFN
from .routers import Predictor, RoutingFrame, router_of
from .routing import (
    Scores,
    gated_update,
    select_explored,
    select_threshold,
    select_topk,
    topk_capacity,
)
from .slots import Slots, assign_group, assign_slots, every_slot, gather_tokens, row_groups, scatter_tokens
from .static import EnteredRows
from .stock import StockLayer
from .surprise import Surprise, surprise


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
    weight: Tensor | None = None
    """float32 [B, T], while training with a forecast or a score that predicts: 0 where the update is not known; for
    explored tokens, how many others each stands for."""
    cost: Tensor | None = None
    """float32 [B, T], what skipping would have lost, where it is known: what the score has to predict."""
    miss: Tensor | None = None
    """float32 [B, T], relative squared error of the forecast, where it is known."""
    before: Tensor | None = None
    """[B, T, D], what enters the routed part, if the frame asks for updates; where every token enters."""
    after: Tensor | None = None
    """[B, T, D], what it makes of each token; likewise."""


class Inside(NamedTuple):
    """What the routed part of a layer works on."""

    hidden_states: Tensor
    """[B, T, D], of all tokens."""
    keys: OwnKeys
    """Whom the tokens attend to that enter."""
    position_embeddings: tuple[Tensor, Tensor]
    more: dict[str, Any]
    """What else the stock attention takes."""


class DecisionLayerMixin(StockLayer):
    """A dense decoder layer that also says how surprising each token was to it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.prior = PriorFFN(config, config.prior_factor, config.prior_dropout)
        self.prior_input_gradient = config.prior_input_gradient

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Surprise:
        """[B, T, D] → posterior [B, T, D]; D_st, D_ch, prior error: float32 [B, T]."""
        posterior = super().forward(hidden_states, **kwargs)
        guess = self.prior(hidden_states if self.prior_input_gradient else hidden_states.detach())
        return surprise(hidden_states, posterior, guess, self.prior_input_gradient)


class RoutedLayerMixin(StockLayer):
    """A decoder layer, or a part of one, that only some tokens enter.

    Attributes:
        norms: names of the norms before and after attention, before and after the MLP; None: there is none.
        window: positions that attention reaches back, its own included; None: all.
    """

    norms: tuple[str | None, ...]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.part = config.routed_part
        self.window = config.window(layer_idx)
        self.by_surprise = config.by_surprise  # not by the router's class: peft may have wrapped it
        self.router = router_of(config, layer_idx)
        self.forecast_prior = Forecast(config) if config.has_forecast else None
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
        its number of slots depends on the scores, unless the frame says how many there are; at γ = 0 and γ = 1 it does
        not. While training all rows go together,
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
            if frame.real is not None:
                return [([], slots)], []
            return [([], slots._replace(routed=None))], [width] * rows  # K of T, in every row
        if frame.slots_per_row is not None:
            everyone = every_slot(rows, tokens, frame.device)
            width = frame.slots_per_row[self.layer_idx]
            return [([], everyone._replace(routed=selected) if tokens == 1 else assign_slots(selected, width))], []
        if self.training:
            return [([], assign_slots(selected, max(1, int(selected.sum(1).max()))))], []
        # The one look at the device. A sum of one column would be an operation for nothing.
        counts = [int(row[0]) for row in selected.tolist()] if selected.shape[1] == 1 else selected.sum(1).tolist()
        rows_together = row_groups(counts)
        return [(rows, assign_group(selected, rows, [counts[row] for row in rows])) for rows in rows_together], counts

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The attention half of the block, [B, T, D] → [B, T, D]."""
        attended = self.self_attn(hidden_states=self.norm(0, hidden_states), **kwargs)[0]
        return self.add(hidden_states, self.norm(1, attended))

    def feed(self, hidden_states: Tensor) -> Tensor:
        """The MLP half of the block, [B, T, D] → [B, T, D]."""
        return self.add(hidden_states, self.norm(3, self.mlp(self.norm(2, hidden_states))))

    def norm(self, place: int, x: Tensor) -> Tensor:
        """X behind one of the block's `norms`, if it has that one."""
        name = self.norms[place]
        return x if name is None else getattr(self, name)(x)

    def add(self, hidden_states: Tensor, update: Tensor) -> Tensor:
        """The residual sum; Granite scales what is added."""
        scale = getattr(self, "residual_multiplier", None)
        return hidden_states + (update if scale is None else update * scale)

    def reach(self, hidden_states: Tensor, **layer_inputs: Any) -> Tensor:
        """What enters the routed part, [B, T, D]: before an MLP that is routed alone, attention is dense."""
        return self.attend(hidden_states, **layer_inputs) if self.part == "mlp" else hidden_states

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
            surprises: D_st, D_ch of the decision layer below, float32 [B, T] (DTF by surprise); else none.
            frame: mode, padding and sinks of this pass.
            capacity: γ of this layer in this pass.
            position_embeddings: cos, sin of the original positions, [B or 1, T, head dim].
            attention_mask: for attention that is not routed; the slots have their own.
            position_ids: unused.
            kwargs: among them, as `CACHE_NAME`, the model's cache; this layer's own part of it grows.
        """
        cache = kwargs.pop(CACHE_NAME, None)
        store = None if cache is None else cache.layers[self.layer_idx]
        dense = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, CACHE_NAME: cache}
        x = self.reach(hidden_states, **dense, **kwargs)
        ranked, scores, logits = self.rank(x, surprises, frame, store)
        selected, threshold = self.select(ranked, frame, capacity)
        groups, counts = self.groups(selected, frame, capacity)
        inside = Inside(x, self._keys(x, position_embeddings, selected, counts, store), position_embeddings, kwargs)
        updated = skipped = self.skip(x, selected, counts)
        known = []
        for rows, slots in groups:
            x_RKD, processed = self._processed(rows, slots, inside, frame)
            gate_RK = gather_tokens(scores.gate.unsqueeze(-1), slots).squeeze(-1)
            skipped_RKD = x_RKD if skipped is x else gather_tokens(skipped, slots)
            y_RKD = gated_update(skipped_RKD, processed, gate_RK, self.config.gate)
            if slots.routed is not None:
                y_RKD = torch.where(slots.routed.unsqueeze(-1), y_RKD, skipped_RKD)
            updated = scatter_tokens(updated, slots, y_RKD)
            known.append(Known(slots, x_RKD, processed))
        shown = _rows(x, known) if frame.shows_updates else (None, None)
        learnt = self._learn(known, selected, inside, frame, capacity) if self.learns else Lesson(None, None, None)
        if self.part == "attention":
            updated = self.feed(updated)
        return RoutedOutput(
            updated, ranked, selected, threshold, scores.gate, scores.s_ce, scores.s_cu, logits, *learnt, *shown
        )

    def skip(self, x: Tensor, selected: Tensor, counts: list[int]) -> Tensor:
        """What tokens are without the routed part: x, or x + f(x) with a forecast; [B, T, D].

        Tokens that enter need it for the gate alone: its gradient, or with a soft gate its value.

        Args:
            x: [B, T, D].
            selected: bool [B, T].
            counts: selected tokens of each row; empty if nobody has looked.
        """
        if self.forecast_prior is None:
            return x
        gated = self.config.gate == "soft" and not self.config.predicts_cost
        if self.training or gated or not counts:
            return x + self.forecast_prior(x)
        if sum(counts) == selected.numel():
            return x
        flat = x.flatten(0, 1)
        at = torch.nonzero_static(~selected.flatten(), size=selected.numel() - sum(counts)).squeeze(1)
        skipping = flat.index_select(0, at)
        return flat.index_copy(0, at, (skipping + self.forecast_prior(skipping)).to(x.dtype)).view_as(x)

    def _processed(self, rows: list[int], slots: Slots, inside: Inside, frame: RoutingFrame) -> tuple[Tensor, Tensor]:
        """What the tokens of some slots are before and after the routed part, [R, K, D] each."""
        x_RKD = gather_tokens(inside.hidden_states, slots)
        with EnteredRows(slots.routed) if frame.triton_kernels and slots.routed is not None else nullcontext():
            if self.part == "mlp":
                return x_RKD, self.feed(x_RKD)
            keys = inside.keys.of_rows(rows, slots)
            cos, sin = (gather_tokens(part, slots) for part in inside.position_embeddings)
            process = super().forward if self.part == "block" else self.attend
            return x_RKD, process(
                x_RKD,
                attention_mask=keys.mask(x_RKD, slots, frame, self.config),
                position_embeddings=(cos, sin),
                **{CACHE_NAME: keys.as_cache},
                **inside.more,
            )

    @property
    def learns(self) -> bool:
        """Whether this pass compares updates with the forecast, or their cost with the score."""
        return self.training and (self.config.has_forecast or self.config.predicts_cost)

    def _learn(
        self, known: list[Known], selected: Tensor, inside: Inside, frame: RoutingFrame, capacity: float
    ) -> Lesson:
        """What the updates say that are known: those of the tokens that entered, and of some that are explored."""
        weight, tokens = selected.float(), frame.shape[1]
        count = round(self.config.explore * (tokens - topk_capacity(capacity, tokens)))
        if frame.noise is not None and count:
            explored, stands_for = select_explored(frame.noise, selected, count, frame.real, frame.sinks)
            known = [*known, self._look(assign_slots(explored, count), selected, inside, frame)]
            weight = torch.where(explored, stands_for, weight)
        if frame.sinks is not None:
            weight = weight.masked_fill(frame.sinks, 0.0)
        return learn(known, inside.hidden_states, weight, self.forecast_prior, self.config)

    @torch.no_grad()
    def _look(self, slots: Slots, selected: Tensor, inside: Inside, frame: RoutingFrame) -> Known:
        """The update of tokens that skip, as if each of them alone had entered besides those that do."""
        if self.part != "mlp" and not self.config.keeps_every_key:
            keys = self._all_keys(inside.hidden_states, inside.position_embeddings)
            offered = selected if self.router.by_token else None
            inside = inside._replace(keys=EveryKey(*keys, offered, window=self.window))
        return Known(slots, *self._processed([], slots, inside, frame))

    def _all_keys(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [B, H, T, E] each."""
        attention, normed = self.self_attn, self.norm(0, x)
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
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], selected: Tensor, counts: list[int], store: Any
    ) -> OwnKeys:
        """Whose keys and values the routed tokens attend to; what the cache keeps is kept here."""
        if self.part == "mlp":
            return OwnKeys()
        if self.config.keeps_every_key:
            keys, values = self._all_keys(x, position_embeddings)
            return EveryKey(*((keys, values) if store is None else store.update(keys, values)), window=self.window)
        if store is None:
            return OwnKeys(window=self.window)
        store.advance(selected)
        return StoredKeys(store, counts, window=self.window) if counts else PlacedKeys(store, window=self.window)


def _rows(x: Tensor, known: list[Known]) -> tuple[Tensor, Tensor]:
    """Before and after the routed part, [B, T, D] each; tokens that are in no slot stay as they are."""
    after = x
    for slots, before, processed in known:
        if slots.routed is not None:
            processed = torch.where(slots.routed.unsqueeze(-1), processed, before)
        after = scatter_tokens(after, slots, processed)
    return x, after
