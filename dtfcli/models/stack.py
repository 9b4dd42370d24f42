"""The stack of layers: embeddings → dense, decision and routed layers in turn → norm.

How one batch passes through it: `prepare` makes its masks, rotary embeddings and `RoutingContext`; `run_layer` takes it
through each layer. The notable choices:

- training routes by `topk`; eval routes by the mode saved with the model, `threshold` unless chosen otherwise;
- masks and rotary embeddings are made once for each kind of attention (with and without a sliding window), by
  Transformers where that does not synchronize with the device;
- training by `topk` never synchronizes. Training by threshold and eval do once in every routed layer, but never for a
  single token, unless it runs on a CPU, where that is free and saves time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, RoutedCache
from .calibration import track_thresholds
from .configuration_fields import CAUSAL_MODES
from .context import RoutingContext, StaticContext
from .keys import as_mask
from .layers import DecisionLayerMixin, RoutedLayerMixin
from .outputs import RoutedModelOutput, RoutingRecord
from .pretrained import DynamicPreTrainedMixin
from .router import Router
from .static import StaticState
from .stock import StockStack
from .triton_kernels import available


@dataclass
class ForwardState:
    """One batch on its way through the stack."""

    hidden_states: Tensor
    context: RoutingContext
    layer_inputs: dict[str, dict[str, Any]]
    """What layers take besides hidden states, by the kind of their attention."""
    positions: Tensor
    below: tuple[Tensor, ...] = ()
    """What the decision layer below observed."""
    prior_errors: list[Tensor] = field(default_factory=list)
    records: list[RoutingRecord] = field(default_factory=list)


class DynamicModelMixin(DynamicPreTrainedMixin, StockStack):
    """The stack of layers.

    Attributes:
        routed: indices of the routed layers.
        kinds: of each layer's attention: with or without a sliding window.
        training_mode: how training routes, "topk" or "threshold".
        training_capacities: γ of each routed layer while training, where it is not the model's own.
        capacity_override: γ of all routed layers in eval; None: the model's own.
        syncs: whether each routed layer of a single token asks the device how many tokens enter, so that no slot stays
            free, as it does for a prompt; None: on a CPU, where asking costs nothing.
        triton_kernels: whether the Triton kernels are used (`use_triton_kernels`).
    """

    decision_layer_class: type
    routed_layer_class: type
    rotary_by_kind = False
    """Whether rotary embeddings differ with the kind of attention, as in Gemma 3."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index in config.routed_layer_indices:
            self.layers[index] = self.routed_layer_class(config, index)
            if config.needs_decision_layers:
                self.layers[index - 1] = self.decision_layer_class(config, index - 1)
        self.routed = tuple(config.routed_layer_indices)
        self.kinds = tuple(config.layer_kind(index) for index in range(len(self.layers)))
        self.training_mode = "topk"
        self.training_capacities: Mapping[int, float] | None = None
        self.capacity_override: float | None = None
        self.syncs: bool | None = None
        self.triton_kernels = False
        self._thresholds_checked_at: tuple[str, float | None] | None = None
        self.post_init()

    @property
    def routers(self) -> dict[int, Router]:
        """Router of each routed layer, by layer index."""
        return {i: self.layers[i].router for i in self.routed}

    def use_triton_kernels(self, used: bool = True) -> None:
        """Take our Triton kernel in static decoding. On a GPU; not saved.

        Raises:
            ValueError: it cannot run here, or weights are no plain tensors.
        """
        if used and not available(self.embed_tokens.weight):
            raise ValueError("our kernels need Triton and a GPU: install triton, or leave them out")
        if used and any(type(parameter) is not torch.nn.Parameter for parameter in self.parameters()):
            raise ValueError("our kernels read plain weights, and these are quantized or sharded: use one of the two")
        self.triton_kernels = used

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> RoutedModelOutput:
        """Run the stack.

        Args:
            position_ids: [B or 1, T]; by default real tokens are counted from 0.
            input_ids, attention_mask, inputs_embeds, past_key_values, cache: as of the language model.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training and self.config.routing != "topk":
            cache = RoutedCache(self.config)
        self.check_inputs(input_ids, inputs_embeds, attention_mask, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        state = self.prepare(inputs_embeds, attention_mask, position_ids, cache)
        self._require_thresholds(state.context)
        for index in range(len(self.layers)):
            self.run_layer(index, state, **kwargs)
        if cache is not None and cache.static is not None:
            cache.static.advance()
        if self.training:
            track_thresholds(state.records, self.routers, state.context)
        return RoutedModelOutput(
            last_hidden_state=self.norm(state.hidden_states),
            prior_errors=tuple(state.prior_errors),
            routing=tuple(state.records),
            is_token=state.context.is_token,
            sinks=state.context.sinks,
            positions=state.positions,
            **{CACHE_NAME: cache},
        )

    def check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, cache: Any
    ) -> None:
        """Raise ValueError for inputs that cannot be routed, with the remedy."""
        if cache is not None and not isinstance(cache, RoutedCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: routed layers keep the tokens they routed alone. Pass "
                "RoutedCache(model.config), or leave it out and the model makes its own"
            )
        if cache is not None and (self.mode == "topk" or self.training):
            raise ValueError(
                f"routing {self.mode!r} while {'training' if self.training else 'evaluating'} cannot continue a cache: "
                "call model.eval() and route by 'threshold'"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if attention_mask is None:
            return
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: routing needs the padding mask [B, T]"
            )
        (batch, tokens), past = given.shape[:2], 0 if cache is None else cache.get_seq_length()
        if tuple(attention_mask.shape) != (batch, past + tokens):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but must cover {batch} rows of {past} "
                f"cached and {tokens} new tokens"
            )

    @property
    def mode(self) -> str:
        """The routing mode of the next pass."""
        return self.training_mode if self.training else self.config.routing

    def capacities(self) -> Mapping[int, float]:
        """γ of each routed layer in the next pass."""
        if self.training and self.training_capacities is not None:
            return self.training_capacities
        return self.config.layer_capacities(None if self.training else self.capacity_override)

    def thresholds(self) -> dict[int, Tensor]:
        """The threshold of each routed layer in the next pass, float32 0-d each; empty in `topk`."""
        if self.mode not in CAUSAL_MODES:
            return {}
        trained = self.config.layer_capacities()
        wanted = trained if self.training else self.capacities()
        return {i: router.threshold_at(self.mode, wanted[i], trained[i]) for i, router in self.routers.items()}

    def _require_thresholds(self, context: RoutingContext) -> None:
        """Refuse thresholds that were never calibrated. Checked once for each capacity: it synchronizes."""
        checked = (self.mode, None if self.training else self.capacity_override)
        if self._thresholds_checked_at == checked:
            return
        for index, threshold in context.thresholds.items():
            if threshold.isnan():
                raise ValueError(
                    f"routing = {self.mode!r} at capacity {context.capacities[index]:g}: layer {index} is not "
                    "calibrated. Call model.calibrate(batches) on text of the kind you will use, or choose routing "
                    "'topk' (not causal)"
                )
        self._thresholds_checked_at = checked

    def prepare(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RoutedCache | None = None,
    ) -> ForwardState:
        """A batch [B, T, D] before its first layer. Positions count real tokens, so padding shifts nothing.

        Args:
            inputs_embeds, attention_mask, position_ids, cache: as of `forward`.
        """
        (batch, tokens), device = inputs_embeds.shape[:2], inputs_embeds.device
        past = 0 if cache is None else cache.get_seq_length()
        padding_mask = None if attention_mask is None else attention_mask.bool().to(device)
        if cache is not None and cache.length is not None:
            if tokens == 1 and past:
                static = cache.to_static(None if padding_mask is None else padding_mask[:, :past])
                return self._prepare_static(inputs_embeds, padding_mask, position_ids, cache, static)
            cache.to_dynamic()
        syncs = tokens > 1 or (device.type == "cpu" if self.syncs is None else self.syncs)
        # `generate` always gives a mask, mostly for nothing.
        asks = syncs and not self.training and self.mode in CAUSAL_MODES
        if padding_mask is not None and asks and bool(padding_mask.all()):
            padding_mask = None
        given_positions = position_ids
        if position_ids is None:
            position_ids = _positions(padding_mask, past, tokens, device)
        if cache is not None:
            cache.count(syncs)
        thresholds = self.thresholds()
        if self.training:  # as they are now: tracking moves them before checkpointing runs the layers again
            thresholds = {i: threshold.clone() for i, threshold in thresholds.items()}
        context = RoutingContext(
            config=self.config,
            mode=self.mode,
            shape=(batch, tokens),
            device=device,
            capacities=self.capacities(),
            thresholds=thresholds,
            padding_mask=padding_mask,
            past=past,
            syncs=syncs,
            noise=torch.rand(batch, tokens, device=device) if self.training and self.config.explores else None,
        )
        return self._state(
            inputs_embeds,
            context,
            position_ids,
            cache,
            lambda kind: self._mask(kind, inputs_embeds, padding_mask, cache, given_positions, syncs),
        )

    def _prepare_static(
        self,
        inputs_embeds: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: RoutedCache,
        static: StaticState,
    ) -> ForwardState:
        """A token of each row, [B, 1, D], on top of a static cache."""
        filled = static.filled.index_fill_(1, static.position, True)
        if padding_mask is not None:
            filled.index_copy_(1, static.position, padding_mask[:, -1:])
        if position_ids is None:
            position_ids = filled.sum(1, keepdim=True) - 1
        context = StaticContext(
            config=self.config,
            mode=self.mode,
            shape=(len(inputs_embeds), 1),
            device=inputs_embeds.device,
            capacities=self.capacities(),
            thresholds=self.thresholds(),
            syncs=False,
            triton_kernels=self.triton_kernels,
            filled=filled,
            position=static.position,
        )

        def mask(kind: str) -> Tensor:
            visible = context.visible(self.config.sliding_window if kind == "sliding_attention" else None)
            return as_mask(visible, inputs_embeds.dtype, self.config._attn_implementation)

        return self._state(inputs_embeds, context, position_ids, cache, mask)

    def _state(
        self,
        inputs_embeds: Tensor,
        context: RoutingContext,
        position_ids: Tensor,
        cache: RoutedCache | None,
        mask: Callable[[str], Any],
    ) -> ForwardState:
        """A batch with all that its layers will ask for."""
        # Now, because a compiled layer cannot enter the lock of a cached property (Python 3.11).
        _ = context.is_token, context.sinks, context.shared_capacity
        next(iter(self.routers.values())).prepare(context)
        layer_inputs = {}
        for kind in set(self.kinds):
            by_kind = (kind,) if self.rotary_by_kind else ()
            embeddings = self.rotary_emb(inputs_embeds, position_ids, *by_kind)
            layer_inputs[kind] = {"attention_mask": mask(kind), CACHE_NAME: cache, "position_embeddings": embeddings}
        scale = getattr(self.config, "embedding_multiplier", None)  # Granite scales its embeddings
        hidden_states = inputs_embeds if scale is None else inputs_embeds * scale
        return ForwardState(hidden_states, context, layer_inputs, position_ids)

    def _mask(
        self,
        kind: str,
        inputs_embeds: Tensor,
        padding_mask: Tensor | None,
        cache: RoutedCache | None,
        given_positions: Tensor | None,
        syncs: bool,
    ) -> Any:
        """The attention mask of layers of a kind that are not routed."""
        slides = kind == "sliding_attention"
        if syncs or padding_mask is None or self.config._attn_implementation != "sdpa":
            # By place: Transformers 5.24 renamed the cache's argument. Without a mask it waits for the device to see
            # whether given positions begin again within a row: ours do not. With one, whether there is padding.
            create = create_sliding_window_causal_mask if slides else create_causal_mask
            return create(self.config, inputs_embeds, padding_mask, cache, given_positions)
        visible = padding_mask.clone()
        if slides:
            visible[:, : -self.config.sliding_window] = False
        return visible[:, None, None]

    def run_layer(self, index: int, state: ForwardState, **kwargs: Any) -> None:
        """Take a batch through one layer."""
        layer, inputs = self.layers[index], state.layer_inputs[self.kinds[index]]
        if isinstance(layer, RoutedLayerMixin):
            state.hidden_states, record = self.route(index, state, state.context, **kwargs)
            state.records.append(record)
        elif isinstance(layer, DecisionLayerMixin):
            state.hidden_states, static, change, error = layer(state.hidden_states, **inputs, **kwargs)
            state.below = (static, change)
            state.prior_errors.append(error)
        else:
            state.hidden_states = layer(state.hidden_states, **inputs, **kwargs)

    def route(
        self, index: int, state: ForwardState, context: RoutingContext, **kwargs: Any
    ) -> tuple[Tensor, RoutingRecord]:
        """What a routed layer makes of a batch that stands below it, and how it treated each token."""
        inputs = state.layer_inputs[self.kinds[index]]
        hidden_states, *record = self.layers[index](
            state.hidden_states, *state.below, context=context, **inputs, **kwargs
        )
        return hidden_states, RoutingRecord(index, *record)

    def forget_checks(self) -> None:
        """Check the thresholds again before the next causal pass: they, or the capacity asked for, changed."""
        self._thresholds_checked_at = None


def _positions(padding_mask: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor:
    """Of new tokens, int64 [B or 1, T]: real ones are counted from 0."""
    if padding_mask is None:
        return torch.arange(past, past + tokens, device=device).unsqueeze(0)
    return (padding_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
