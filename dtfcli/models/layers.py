"""The two kinds of layer around the backbone's own blocks, and the small networks that routing adds.

Everything is a subclass of the stock decoder layer, so that the backbone keeps its parameter names; what is new has
`prior` or `router` in its name:

    decision layer   dense block, then PriorFFN: hands D_st, D_ch upwards (DTF)
    routed layer     router → slots → block on the routed tokens → gated update

Layers return flat tuples of tensors, hidden states first: gradient checkpointing runs a forward twice, so nothing may
be recorded on the side.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, exp, log
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .cache import CACHE_NAME
from .keys import EveryKey, OwnKeys, StoredKeys
from .routing import (
    Scores,
    assign_slots,
    dtf_scores,
    gated_update,
    gather_tokens,
    mod_scores,
    moving_average,
    prior_error,
    scatter_tokens,
    select_threshold,
    select_topk,
    sink_mask,
    surprise,
    topk_capacity,
)

CAPACITY_GRID = (0.0, 0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375, 1.0)
"""γ for which calibration measures thresholds; others are interpolated."""

THRESHOLD_COLUMNS = 1 + len(CAPACITY_GRID)
"""Column 0 is the threshold at the model's own capacity (also tracked while training), then the grid."""


@dataclass(frozen=True)
class RoutingFrame:
    """What all routed layers of one forward pass share.

    Attributes:
        mode: "topk" or "threshold".
        capacity: γ asked for at inference; None: each layer's own.
        seen: bool [B, S + T], False for padding, over the S cached positions and the T new ones; None: no padding.
        sink_tokens: how many leading real tokens of each row are sinks.
        shape: B and T.
        past: S.
        column: the threshold column to use instead of `capacity` (calibration).
    """

    mode: str
    shape: tuple[int, int]
    device: torch.device
    capacity: float | None = None
    seen: Tensor | None = None
    sink_tokens: int = 0
    past: int = 0
    column: int | None = None

    @cached_property
    def real(self) -> Tensor | None:
        """Which of the new tokens are not padding, bool [B, T]; None: all."""
        return None if self.seen is None else self.seen[:, self.past :]

    @cached_property
    def seen_sinks(self) -> Tensor | None:
        """Which of all tokens are sinks, bool [B, S + T]; None: there are none."""
        return sink_mask(self.seen, self.sink_tokens, (self.shape[0], self.past + self.shape[1]), self.device)

    @cached_property
    def sinks(self) -> Tensor | None:
        """Which of the new tokens are sinks, bool [B, T]; None: there are none."""
        return None if self.seen_sinks is None else self.seen_sinks[:, self.past :]


class PriorFFN(nn.Module):
    """prior = x + W_out(silu(W_gate n) · W_up n), n = RMSNorm(x) (3.1–3.3): a cheap guess at the decision layer.

    Width ⌈D·f⌉ rounded up to an even number, at least 2; no biases.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = ceil(config.hidden_size * config.prior_factor)
        width = max(2, width + width % 2)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.w_gate = nn.Linear(config.hidden_size, width, bias=False)
        self.w_up = nn.Linear(config.hidden_size, width, bias=False)
        self.w_out = nn.Linear(width, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.prior_dropout)

    def forward(self, original: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        normed = self.norm(original)
        return original + self.dropout(self.w_out(nn.functional.silu(self.w_gate(normed)) * self.w_up(normed)))


class Router(nn.Module):
    """Thresholds of one routed layer, common to both architectures; always float32, whatever the model's dtype.

    Calibrated thresholds lie close together: bfloat16 would merge them.
    """

    thresholds: Tensor

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("thresholds", torch.full((THRESHOLD_COLUMNS,), torch.nan, dtype=torch.float32))

    def reset_parameters(self) -> None:
        self.thresholds.fill_(torch.nan)

    def threshold(self, capacity: float | None, column: int | None = None) -> Tensor:
        """The threshold at γ (None: the layer's own), float32 0-d; NaN where nothing was calibrated."""
        if column is not None:
            return self.thresholds[column]
        if (self.capacity if capacity is None else capacity) >= 1.0:
            return self.thresholds.new_full((), -torch.inf)
        if capacity is None or capacity == self.capacity:
            return self.thresholds[0]
        if capacity in CAPACITY_GRID:
            return self.thresholds[1 + CAPACITY_GRID.index(capacity)]
        above = next(i for i, share in enumerate(CAPACITY_GRID) if share >= capacity)
        low, high = CAPACITY_GRID[above - 1], CAPACITY_GRID[above]
        return torch.lerp(self.thresholds[above], self.thresholds[above + 1], (capacity - low) / (high - low))

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor.is_meta:
                return moved.float() if moved.is_floating_point() else moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(keep_float32, recurse)


class PredictiveRouter(Router):
    """DTF: gates by expected and unexpected change (3.8–3.12), with four learnable scalars.

    o_ce and m_cu are stored as logarithms: they must stay positive (ln of a negative o_ce is a NaN).
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config.layer_capacity(layer_idx))
        self.window = config.ma_window
        self.skip_sinks = config.skips_sinks_in_average
        self.initial = {
            "log_o_ce": log(config.o_ce_init),
            "log_m_cu": log(config.m_cu_init),
            "beta_ce": config.beta_ce_init,
            "beta_cu": config.beta_cu_init,
        }
        for name in self.initial:
            self.register_parameter(name, nn.Parameter(torch.empty(1, dtype=torch.float32)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in self.initial.items():
            getattr(self, name).fill_(value)

    def forward(self, static: Tensor, change: Tensor, history: Tensor, frame: RoutingFrame) -> Scores:
        """D_st, D_ch of the new tokens: float32 [B, T]; D_st of the row up to them: float32 [B, S + T]."""
        counted = frame.seen
        if self.skip_sinks and frame.seen_sinks is not None:
            counted = ~frame.seen_sinks if counted is None else counted & ~frame.seen_sinks
        average = moving_average(history, self.window, counted)[:, frame.past :]
        return dtf_scores(static, change, average, self.log_o_ce.exp(), self.log_m_cu.exp(), self.beta_ce, self.beta_cu)

    def scalars(self) -> dict[str, float]:
        """The four scalars of the paper, for reports."""
        return {
            "o_ce": exp(self.log_o_ce.item()),
            "m_cu": exp(self.log_m_cu.item()),
            "beta_ce": self.beta_ce.item(),
            "beta_cu": self.beta_cu.item(),
        }


class LinearRouter(Router):
    """MoD: a linear score of the token's hidden state."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config.layer_capacity(layer_idx))
        self.gate = config.mod_gate
        self.std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.normal_(0.0, self.std)

    def forward(self, hidden_states: Tensor) -> Scores:
        """[B, T, D] → scores [B, T]."""
        return mod_scores(hidden_states, self.weight, self.gate)

    def scalars(self) -> dict[str, float]:
        return {}


class DecisionLayerMixin(nn.Module):
    """A dense decoder layer that also says how surprising each token was to it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.prior = PriorFFN(config)
        self.prior_input_gradient = config.prior_input_gradient

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, D] → posterior [B, T, D]; D_st, D_ch, prior error: float32 [B, T]."""
        posterior = super().forward(hidden_states, **kwargs)
        prior = self.prior(hidden_states if self.prior_input_gradient else hidden_states.detach())
        static, change = surprise(hidden_states, posterior, prior)
        return posterior, static, change, prior_error(prior, posterior)


class RoutedLayerMixin(nn.Module):
    """A decoder layer that only some tokens enter."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.router = (PredictiveRouter if config.architecture == "dtf" else LinearRouter)(config, layer_idx)

    def score(
        self, hidden_states: Tensor, surprises: tuple[Tensor, ...], frame: RoutingFrame, store: Any = None
    ) -> Scores:
        """The router's scores in float32, also under autocast; `surprises` is (D_st, D_ch) for DTF, () for MoD."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            if not isinstance(self.router, PredictiveRouter):
                return self.router(hidden_states)
            static, change = surprises
            history = static if store is None else store.extend_surprise(static)
            return self.router(static, change, history, frame)

    def select(self, scores: Tensor, frame: RoutingFrame) -> tuple[Tensor, int, list[int] | None]:
        """Which tokens enter, bool [B, T]; the slots that the fullest row needs; how many of each row, where known.

        `topk` never waits for the device. `threshold` looks once: its number of slots depends on the scores.
        """
        if frame.mode == "topk":
            capacity = self.router.capacity if frame.capacity is None else frame.capacity
            selected = select_topk(scores, capacity, frame.real, frame.sinks)
            return selected, topk_capacity(capacity, scores.shape[1]), None
        threshold = self.router.threshold(frame.capacity, frame.column)
        selected = select_threshold(scores, threshold, frame.real, frame.sinks)
        if self.training:
            # Never zero slots: every process of a distributed run has to enter every layer.
            return selected, max(1, int(selected.sum(1).max())), None
        counts = selected.sum(1).tolist()
        return selected, max(counts), counts

    def forward(
        self,
        hidden_states: Tensor,
        *surprises: Tensor,
        frame: RoutingFrame,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Route, process, write back.

        Args:
            hidden_states: [B, T, D].
            surprises: D_st, D_ch of the decision layer below, float32 [B, T] (DTF); none (MoD).
            frame: mode, padding and sinks.
            position_embeddings: cos, sin of the original positions, [B or 1, T, head dim].
            attention_mask, position_ids: those of the dense layers, not used: the slots have their own.
            kwargs: among them, as `CACHE_NAME`, the model's cache; this layer's own part of it grows.

        Returns:
            hidden states [B, T, D], scores [B, T], selected bool [B, T], gate [B, T], s_ce, s_cu (None for MoD).
        """
        cache = kwargs.pop(CACHE_NAME, None)
        store = None if cache is None else cache.layers[self.layer_idx]
        scores = self.score(hidden_states, surprises, frame, store)
        selected, width, counts = self.select(scores.score, frame)
        keys = self._keys(hidden_states, position_embeddings, selected, counts, store)
        if width > 0:
            slots = assign_slots(selected, width, counts)
            x_RKD = gather_tokens(hidden_states, slots)
            cos, sin = (gather_tokens(part, slots) for part in position_embeddings)
            processed = super().forward(
                x_RKD,
                attention_mask=keys.mask(x_RKD, slots, frame, self.config),
                position_embeddings=(cos, sin),
                **{CACHE_NAME: keys.for_slots(slots)},
                **kwargs,
            )
            gate_RK = gather_tokens(scores.gate.unsqueeze(-1), slots).squeeze(-1)
            updated = gated_update(x_RKD, processed, gate_RK, self.config.gate)
            hidden_states = scatter_tokens(
                hidden_states, slots, torch.where(slots.routed.unsqueeze(-1), updated, x_RKD)
            )
        return hidden_states, scores.score, selected, scores.gate, scores.s_ce, scores.s_cu

    def _keys(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        selected: Tensor,
        counts: list[int] | None,
        store: Any,
    ) -> OwnKeys:
        """Whose keys and values the routed tokens attend to; what the cache keeps is kept here."""
        if self.config.kv_tokens == "all":
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


class DecisionLlamaLayer(DecisionLayerMixin, LlamaDecoderLayer):
    """Decision layer of a Llama-type backbone."""


class RoutedLlamaLayer(RoutedLayerMixin, LlamaDecoderLayer):
    """Routed layer of a Llama-type backbone."""


class DecisionQwenLayer(DecisionLayerMixin, Qwen2DecoderLayer):
    """Decision layer of a Qwen2 backbone."""


class RoutedQwenLayer(RoutedLayerMixin, Qwen2DecoderLayer):
    """Routed layer of a Qwen2 backbone."""
