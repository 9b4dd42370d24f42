"""Routed Qwen2 and Llama models: the stock classes, with some layers replaced.

One tensor's way: embeddings → dense, decision and routed layers in turn → norm → head. The notable choices:

- backbone parameter names are unchanged, so a dense checkpoint loads straight into a routed class;
- training routes by `topk`; eval routes by the mode saved with the model, `threshold` unless chosen otherwise;
- anything missing from a checkpoint is an error, except what routing adds to a dense one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedConfig, Qwen2ForCausalLM, Qwen2Model
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, RoutedCache
from .configuration_dynamic import DynamicLlamaConfig, DynamicQwenConfig
from .configuration_fields import ROUTING_MODES
from .layers import (
    CAPACITY_GRID,
    DecisionLayerMixin,
    DecisionLlamaLayer,
    DecisionQwenLayer,
    RoutedLayerMixin,
    RoutedLlamaLayer,
    RoutedQwenLayer,
    Router,
    RoutingFrame,
)
from .losses import causal_lm_loss
from .outputs import RoutedCausalLMOutput, RoutedModelOutput, RoutingRecord
from .routing import masked_mean, share_threshold

ADDED_NAMES = ("router", "prior", "predictor")
"""Every parameter and buffer that routing adds has one of these in its name."""

_THRESHOLD_MOMENTUM = 0.9
"""Of the moving average of per-batch thresholds while training: it spans about ten updates."""


def is_added(name: str) -> bool:
    """Whether a parameter or buffer name is routing's own, not the backbone's."""
    return any(part in name for part in ADDED_NAMES)


class DynamicPreTrainedMixin:
    """Initialization and loading, common to the stack and the language model."""

    _no_split_modules = [  # noqa: RUF012
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "DecisionLlamaLayer",
        "RoutedLlamaLayer",
        "DecisionQwenLayer",
        "RoutedQwenLayer",
    ]
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a routed checkpoint, or a dense one whose routers and priors then start afresh.

        Raises:
            ValueError: keys of the backbone are missing or unexpected; or the checkpoint is a routed one and lacks
                routing parameters (Transformers alone would only warn and initialize them).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        if kwargs.get("gguf_file") is not None or pretrained_model_name_or_path is None:
            from_dense = True
        else:
            hub = {
                k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
            }
            source, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            from_dense = not str(source.get("model_type", "")).startswith("dynamic_")
        lost = sorted(key for key in missing if not (from_dense and is_added(key)))
        if lost or unexpected:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights do not fit {cls.__name__}. Missing: "
                f"{_some(lost)}; not known: {_some(sorted(unexpected))}. The file is damaged or of another model; "
                "nothing was initialized in their place."
            )
        return (model, info) if wants_info else model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


@dataclass
class Stream:
    """One batch on its way through the stack."""

    hidden_states: Tensor
    frame: RoutingFrame
    layer_inputs: dict[str, Any]
    positions: Tensor
    surprises: tuple[Tensor, ...] = ()
    prior_errors: list[Tensor] = field(default_factory=list)
    records: list[RoutingRecord] = field(default_factory=list)


class DynamicModelMixin(DynamicPreTrainedMixin):
    """The stack of layers."""

    decision_layer_class: type
    routed_layer_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index in config.routed_layer_indices:
            self.layers[index] = self.routed_layer_class(config, index)
            if config.architecture == "dtf":
                self.layers[index - 1] = self.decision_layer_class(config, index - 1)
        self.training_mode = "topk"
        self.capacity_override: float | None = None
        self._thresholds_seen_at: tuple[float | None] | None = None
        self.post_init()

    @property
    def routers(self) -> dict[int, Router]:
        """Router of each routed layer, by layer index."""
        return {i: layer.router for i, layer in enumerate(self.layers) if isinstance(layer, RoutedLayerMixin)}

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
            input_ids: int64 [B, T]; or inputs_embeds [B, T, D].
            attention_mask: [B, T], 0 for padding on either side.
            position_ids: [B or 1, T]; by default real tokens are counted from 0.
            past_key_values, cache: the same under its two names, a `RoutedCache`; None: with `use_cache` a new one.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training and self.config.routing != "topk":
            cache = RoutedCache(self.config)
        stream = self._enter(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if stream.frame.mode == "threshold":
            self._require_thresholds(stream.frame)
        for index, layer in enumerate(self.layers):
            self._step(index, layer, stream, **kwargs)
        if self.training:
            self._track_thresholds(stream)
        return RoutedModelOutput(
            last_hidden_state=self.norm(stream.hidden_states),
            prior_errors=tuple(stream.prior_errors),
            routing=tuple(stream.records),
            real=stream.frame.real,
            sinks=stream.frame.sinks,
            positions=stream.positions,
            **{CACHE_NAME: cache},
        )

    def _enter(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        cache: RoutedCache | None = None,
    ) -> Stream:
        """Embeddings, masks and rotary positions. Positions count real tokens, so padding shifts nothing."""
        if cache is not None and not isinstance(cache, RoutedCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: routed layers keep the tokens they routed alone. Pass "
                "RoutedCache(model.config), or leave it out and the model makes its own"
            )
        mode = self.training_mode if self.training else self.config.routing
        if cache is not None and mode == "topk":
            raise ValueError("routing 'topk' sees the whole sequence and cannot continue a cache; use 'threshold'")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: routing needs the padding mask [B, T]"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        (batch, tokens), device = inputs_embeds.shape[:2], inputs_embeds.device
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + tokens):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but must cover {batch} rows of {past} "
                f"cached and {tokens} new tokens"
            )
        seen = None if attention_mask is None else attention_mask.bool().to(device)
        if position_ids is None and seen is None:
            position_ids = torch.arange(past, past + tokens, device=device).unsqueeze(0)
        elif position_ids is None:
            position_ids = (seen.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        return Stream(
            hidden_states=inputs_embeds,
            positions=position_ids,
            frame=RoutingFrame(
                mode=mode,
                shape=(batch, tokens),
                device=device,
                capacity=None if self.training else self.capacity_override,
                seen=seen,
                sink_tokens=self.config.sink_tokens,
                past=past,
            ),
            layer_inputs={
                # By place: Transformers 5.24 renamed the cache's argument.
                "attention_mask": create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids),
                CACHE_NAME: cache,
                "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            },
        )

    def _step(self, index: int, layer: Any, stream: Stream, **kwargs: Any) -> None:
        """Pass one layer."""
        if isinstance(layer, RoutedLayerMixin):
            stream.hidden_states, scores, selected, gate, s_ce, s_cu = layer(
                stream.hidden_states, *stream.surprises, frame=stream.frame, **stream.layer_inputs, **kwargs
            )
            record = RoutingRecord(layer=index, scores=scores, selected=selected, gate=gate, s_ce=s_ce, s_cu=s_cu)
            if stream.frame.mode == "threshold":
                record.threshold = layer.router.threshold(stream.frame.capacity, stream.frame.column)
            if stream.surprises:
                record.static_surprise, record.change_surprise = stream.surprises
            stream.records.append(record)
        elif isinstance(layer, DecisionLayerMixin):
            stream.hidden_states, static, change, error = layer(stream.hidden_states, **stream.layer_inputs, **kwargs)
            stream.surprises = (static, change)
            stream.prior_errors.append(error)
        else:
            stream.hidden_states = layer(stream.hidden_states, **stream.layer_inputs, **kwargs)

    @torch.no_grad()
    def _track_thresholds(self, stream: Stream) -> None:
        """Move each layer's own threshold towards this batch's; a first batch sets it."""
        for record, router in zip(stream.records, self.routers.values(), strict=True):
            batch = share_threshold(record.scores, router.capacity, stream.frame.real, stream.frame.sinks)
            known = router.thresholds[0]
            router.thresholds[0] = torch.where(known.isnan(), batch, torch.lerp(batch, known, _THRESHOLD_MOMENTUM))

    def _require_thresholds(self, frame: RoutingFrame) -> None:
        """Refuse thresholds that were never calibrated. Looked at once for each capacity: it waits for the device."""
        if self._thresholds_seen_at == (frame.capacity,):
            return
        for index, router in self.routers.items():
            if router.threshold(frame.capacity).isnan():
                capacity = router.capacity if frame.capacity is None else frame.capacity
                raise ValueError(
                    f"routing = 'threshold' at capacity {capacity:g}: layer {index} is not calibrated. Call "
                    "model.calibrate(batches) on text of the kind you will use, or choose routing 'topk' (not causal)"
                )
        self._thresholds_seen_at = (frame.capacity,)

    @torch.no_grad()
    def calibrate(self, batches: list[Mapping[str, Tensor]], columns: Iterable[int]) -> None:
        """Measure threshold columns, layer by layer with the layers below already thresholded.

        All batches advance through the stack together: at a routed layer the scores of all their real tokens give one
        threshold, with which the batches then pass that layer. What lies below the first routed layer is the same for
        all columns and computed once.
        """
        first, last = min(self.routers), max(self.routers)
        entering = [self._enter(b["input_ids"], None, b.get("attention_mask")) for b in batches]
        for index in range(first):
            for stream in entering:
                self._step(index, self.layers[index], stream)
        for column in columns:
            streams = [
                replace(s, frame=replace(s.frame, mode="threshold", column=column), prior_errors=[], records=[])
                for s in entering
            ]
            for index in range(first, last + 1):
                layer = self.layers[index]
                if isinstance(layer, RoutedLayerMixin):
                    router = layer.router
                    share = router.capacity if column == 0 else CAPACITY_GRID[column - 1]
                    scores = [layer.score(s.hidden_states, s.surprises, s.frame).score for s in streams]
                    router.thresholds[column] = share_threshold(
                        _pool(scores),
                        share,
                        _pool([_all_if_none(s.frame.real, x, True) for s, x in zip(streams, scores, strict=True)]),
                        _pool([_all_if_none(s.frame.sinks, x, False) for s, x in zip(streams, scores, strict=True)]),
                    )
                if index == last:
                    break  # nothing above is routed
                for stream in streams:
                    self._step(index, layer, stream)
        self._thresholds_seen_at = None


def _pool(tensors: list[Tensor]) -> Tensor:
    """[B, T] tensors of several batches as one row."""
    return torch.cat([tensor.flatten() for tensor in tensors]).unsqueeze(0)


def _all_if_none(mask: Tensor | None, like: Tensor, value: bool) -> Tensor:
    return torch.full_like(like, value, dtype=torch.bool) if mask is None else mask


class DynamicCausalLMMixin(DynamicPreTrainedMixin):
    """The stack with its language-model head, losses and routing controls."""

    stack_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.stack_class(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routing: bool = False,
        output_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> RoutedCausalLMOutput | tuple[Any, ...]:
        """Next-token logits, losses and, on request, what was routed.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, D].
            attention_mask: [B, T], 0 for padding on either side.
            past_key_values, cache: the same under its two names, a `RoutedCache`; None: with `use_cache` a new one.
            labels: int64 [B, T], not shifted; -100 is ignored.
            logits_to_keep: as in Transformers: the last so many positions, 0 for all.
            output_routing: return a `RoutingRecord` for each routed layer.
            output_logits: False never materializes the logits; None: they are left out while training with labels.
            num_items_in_batch: targets in the whole update; losses are then sums over it instead of means over
                this batch, the auxiliary ones scaled alike.

        Raises:
            ValueError: `threshold` routing without calibration; a foreign cache; a mask that does not cover all tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if output_logits is None:
            output_logits = labels is None or not self.training
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep)) if output_logits else None

        loss = lm_loss = prior_loss = router_loss = None
        if labels is not None:
            lm_loss = causal_lm_loss(hidden_states, self.lm_head.weight, labels, num_items_in_batch)
            prior_loss, router_loss = self._auxiliary_losses(outputs, labels, num_items_in_batch)
            loss = lm_loss
            if self.training and prior_loss is not None:
                loss = loss + self.config.prior_loss_weight * prior_loss
            if self.training and router_loss is not None:
                loss = loss + router_loss
        result = RoutedCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            prior_loss=prior_loss,
            router_loss=router_loss,
            routing=outputs.routing if output_routing else None,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return result if return_dict is not False else result.to_tuple()

    def _auxiliary_losses(
        self, outputs: RoutedModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Prior loss (3.5), unweighted; MoD's router losses, weighted and summed. None where there are none."""
        share: Any = 1.0
        if num_items_in_batch is not None:
            share = (labels[:, 1:] != -100).sum() / num_items_in_batch
        prior_loss = router_loss = None
        if outputs.prior_errors:
            counted = outputs.real
            if outputs.sinks is not None:
                counted = ~outputs.sinks if counted is None else counted & ~outputs.sinks
            errors = [masked_mean(error, counted) for error in outputs.prior_errors]
            prior_loss = torch.stack(errors).mean() * share
        config = self.config
        if config.architecture == "mod" and (config.router_aux_loss_weight or config.router_z_loss_weight):
            terms = []
            for record in outputs.routing:
                against_own_topk = torch.nn.functional.binary_cross_entropy_with_logits(
                    record.scores, record.selected.float(), reduction="none"
                )
                terms.append(
                    config.router_aux_loss_weight * masked_mean(against_own_topk, outputs.real)
                    + config.router_z_loss_weight * masked_mean(record.scores.square(), outputs.real)
                )
            router_loss = torch.stack(terms).mean() * share
        return prior_loss, router_loss

    @property
    def routing(self) -> str:
        """The routing mode of eval: "threshold" or "topk"."""
        return self.config.routing

    @property
    def capacity(self) -> float | list[float]:
        """γ in eval: the one asked for with `set_routing`, else the model's own."""
        override = self.model.capacity_override
        return self.config.capacity if override is None else override

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers that route."""
        return list(self.model.routers)

    @property
    def is_calibrated(self) -> bool:
        """Whether every routed layer knows a threshold for the model's own capacity."""
        return not any(router.threshold(None).isnan() for router in self.model.routers.values())

    def set_routing(self, mode: str, capacity: float | None = None) -> None:
        """Choose how tokens are routed in eval.

        Args:
            mode: "threshold" (causal) or "topk" (the training rule over the whole sequence; not causal). Saved with
                the model.
            capacity: γ in (0, 1] for all routed layers; None: the model's own. Not saved.

        Raises:
            ValueError: unknown mode, or a capacity outside (0, 1].
        """
        if mode not in ROUTING_MODES:
            raise ValueError(f"routing = {mode!r}: choose one of {', '.join(ROUTING_MODES)}")
        if capacity is not None and not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity = {capacity!r}: the share of routed tokens lies above 0 and at most at 1")
        self.config.routing = mode
        self.model.capacity_override = None if capacity is None else float(capacity)
        self.model._thresholds_seen_at = None

    def set_training_routing(self, mode: str) -> None:
        """Choose how tokens are routed while training: "topk" (the default) or, for the end of a run, "threshold".

        With "threshold" the model trains on what eval will do: rows route as many tokens as score above the thresholds
        that training tracks. Not saved.

        Raises:
            ValueError: unknown mode.
        """
        if mode not in ROUTING_MODES:
            raise ValueError(f"routing = {mode!r}: choose one of {', '.join(ROUTING_MODES)}")
        self.model.training_mode = mode

    @contextmanager
    def routing_mode(self, mode: str, capacity: float | None = None) -> Iterator[None]:
        """`set_routing` for the length of a `with` block."""
        before = self.config.routing, self.model.capacity_override
        self.set_routing(mode, capacity)
        try:
            yield
        finally:
            self.set_routing(*before)

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]], capacities: Iterable[float] | None = None) -> None:
        """Measure the thresholds of `threshold` routing on text of the kind that will be routed.

        For each γ one forward pass over all batches: each routed layer takes the quantile of the scores it sees, the
        layers below it already thresholded, because they change what it sees. Eight thousand tokens and more, short
        and long rows mixed, give shares within two points of γ. Use training text, never what will be reported on.

        Args:
            batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].
            capacities: γ of the grid to measure besides the model's own; None: the whole grid (twelve passes), so that
                any γ can be asked for; (): the model's own alone.

        Raises:
            ValueError: no batches, or a capacity that is not in the grid.
        """
        moved = [{k: v.to(self.device) for k, v in b.items() if k in ("input_ids", "attention_mask")} for b in batches]
        if not moved:
            raise ValueError("batches is empty: calibration needs text, some thousand tokens of it")
        columns = [0]
        for capacity in CAPACITY_GRID if capacities is None else capacities:
            if capacity not in CAPACITY_GRID:
                raise ValueError(f"capacities has {capacity!r}: choose from {', '.join(map(str, CAPACITY_GRID))}")
            columns.append(1 + CAPACITY_GRID.index(capacity))
        was_training = self.training
        self.eval()
        self.model.calibrate(moved, columns)
        self.train(was_training)

    def router_scalars(self) -> dict[int, dict[str, float]]:
        """For each routed layer its own threshold and, for DTF, o_ce, m_cu, beta_ce and beta_cu."""
        return {
            index: router.scalars() | {"threshold": router.thresholds[0].item()}
            for index, router in self.model.routers.items()
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: Any
    ) -> None:
        """Give `generate` a `RoutedCache`: assisted decoding asks for it before the first forward."""
        if self.config.routing == "topk":
            raise ValueError("routing 'topk' sees the whole sequence: generate with routing 'threshold'")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: routed models have their own "
                "cache; leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = RoutedCache(self.config)


class DynamicLlamaModel(DynamicModelMixin, LlamaModel):
    """Routed stack of a Llama-type model."""

    config_class = DynamicLlamaConfig
    decision_layer_class = DecisionLlamaLayer
    routed_layer_class = RoutedLlamaLayer


class DynamicLlamaForCausalLM(DynamicCausalLMMixin, LlamaForCausalLM):
    """Routed Llama-type language model: DTF or MoD, as its config says."""

    config_class = DynamicLlamaConfig
    stack_class = DynamicLlamaModel


class DynamicQwenModel(DynamicModelMixin, Qwen2Model):
    """Routed stack of a Qwen2 model."""

    config_class = DynamicQwenConfig
    decision_layer_class = DecisionQwenLayer
    routed_layer_class = RoutedQwenLayer


class DynamicQwenForCausalLM(DynamicCausalLMMixin, Qwen2ForCausalLM):
    """Routed Qwen2 language model: DTF or MoD, as its config says."""

    config_class = DynamicQwenConfig
    stack_class = DynamicQwenModel


# Saving copies these files beside the weights and names the classes in `auto_map`.
for _config_class, _model_class in (
    (DynamicLlamaConfig, DynamicLlamaForCausalLM),
    (DynamicQwenConfig, DynamicQwenForCausalLM),
):
    _config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["DynamicLlamaForCausalLM", "DynamicLlamaModel", "DynamicQwenForCausalLM", "DynamicQwenModel"]
