"""The stack of layers: embeddings → dense, decision and routed layers in turn → norm.

How one batch walks through it, how thresholds are tracked while training and calibrated afterwards, and what makes
loading strict. The notable choices:

- backbone parameter names are unchanged, so a dense checkpoint loads straight into a routed class;
- training routes by `topk`; eval routes by the mode saved with the model, `threshold` unless chosen otherwise;
- anything missing from a checkpoint is an error, except what routing adds to a dense one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedConfig, Qwen2Model
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, RoutedCache
from .configuration_dynamic import DynamicLlamaConfig, DynamicQwenConfig
from .configuration_fields import CAUSAL_MODES
from .layers import (
    DecisionLayerMixin,
    DecisionLlamaLayer,
    DecisionQwenLayer,
    RoutedLayerMixin,
    RoutedLlamaLayer,
    RoutedQwenLayer,
)
from .outputs import RoutedModelOutput, RoutingRecord
from .routers import CAPACITY_GRID, Router, RoutingFrame, Rule, rules_by_layer
from .routing import share_threshold

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
        self._thresholds_seen_at: tuple[str, float | None] | None = None
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
        output_routing: bool = True,
        **kwargs: Any,
    ) -> RoutedModelOutput:
        """Run the stack.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, D].
            attention_mask: [B, T], 0 for padding on either side.
            position_ids: [B or 1, T]; by default real tokens are counted from 0.
            past_key_values, cache: the same under its two names, a `RoutedCache`; None: with `use_cache` a new one.
            output_routing: False lets records do without gates and criteria.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training and self.config.routing != "topk":
            cache = RoutedCache(self.config)
        stream = self._enter(input_ids, inputs_embeds, attention_mask, position_ids, cache, output_routing)
        stream.frame.prepare(self.config.architecture)
        if stream.frame.mode in CAUSAL_MODES:
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
        output_routing: bool = True,
    ) -> Stream:
        """Embeddings, masks and rotary positions. Positions count real tokens, so padding shifts nothing."""
        if cache is not None and not isinstance(cache, RoutedCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: routed layers keep the tokens they routed alone. Pass "
                "RoutedCache(model.config), or leave it out and the model makes its own"
            )
        mode = self.training_mode if self.training else self.config.routing
        if cache is not None and (mode == "topk" or self.training):
            raise ValueError(
                f"routing {mode!r} while {'training' if self.training else 'evaluating'} cannot continue a cache: "
                "call model.eval() and route by 'threshold'"
            )
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
        if seen is not None and not self.training and mode in CAUSAL_MODES and bool(seen.all()):
            seen = attention_mask = None  # `generate` always gives a mask; a causal mode waits for the device anyway
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
                average_window=self.config.ma_window,
                average_skips_sinks=self.config.skips_sinks_in_average,
                past=past,
                gates=output_routing or self.config.gate == "soft" or torch.is_grad_enabled(),
                rules=self._rules(mode, device, cache),
                kv_tokens=self.config.kv_tokens,
                gate=self.config.gate,
            ),
            layer_inputs={
                # By place: Transformers 5.24 renamed the cache's argument.
                "attention_mask": create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids),
                CACHE_NAME: cache,
                "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            },
        )

    def _rules(self, mode: str, device: torch.device, cache: RoutedCache | None) -> Mapping[int, Rule] | None:
        """Those of all routed layers, where they can be had before any layer is asked.

        A text that is being generated keeps DTF's criteria in its cache. While training only the thresholds are looked
        up, as tracking moves them between a forward pass and what is recomputed of it; with a gradient each layer's
        criteria belong to its own graph. None: where some router lies elsewhere than the tokens (on several devices,
        offloaded, or in parts, some of them empty).
        """
        if self.training and mode in CAUSAL_MODES:
            return {i: Rule(None, r.threshold(mode).clone()) for i, r in self.routers.items()}
        if self.training or torch.is_grad_enabled() or self.config.architecture != "dtf":
            return None
        if cache is not None and device in cache.rules:
            return cache.rules[device]
        routers = self.routers
        own = [next(router.parameters(recurse=False), None) for router in routers.values()]
        if any(type(w) is not torch.nn.Parameter or w.device != device or not w.numel() for w in own):
            return None
        rules = rules_by_layer(routers)
        if cache is not None:
            cache.rules[device] = rules
        return rules

    def _step(self, index: int, layer: Any, stream: Stream, **kwargs: Any) -> None:
        """Pass one layer."""
        if isinstance(layer, RoutedLayerMixin):
            frame = stream.frame
            stream.hidden_states, ranked, selected, threshold, gate, s_ce, s_cu, logits = layer(
                stream.hidden_states, *stream.surprises, frame=frame, **stream.layer_inputs, **kwargs
            )
            static, change = stream.surprises or (None, None)
            stream.records.append(
                RoutingRecord(
                    layer=index,
                    scores=ranked,
                    selected=selected,
                    gate=gate,
                    threshold=threshold,
                    static_surprise=static,
                    change_surprise=change,
                    s_ce=s_ce,
                    s_cu=s_cu,
                    predictor_logits=logits,
                )
            )
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
        if self._thresholds_seen_at == (frame.mode, frame.capacity):
            return
        for index, router in self.routers.items():
            if router.threshold(frame.mode, frame.capacity).isnan():
                capacity = router.capacity if frame.capacity is None else frame.capacity
                raise ValueError(
                    f"routing = {frame.mode!r} at capacity {capacity:g}: layer {index} is not calibrated. Call "
                    "model.calibrate(batches) on text of the kind you will use, or choose routing 'topk' (not causal)"
                )
        self._thresholds_seen_at = (frame.mode, frame.capacity)

    @torch.no_grad()
    def calibrate(self, batches: list[Mapping[str, Tensor]], columns: Iterable[tuple[str, int]]) -> None:
        """Measure columns of the thresholds of a mode, layer by layer with the layers below already thresholded.

        All batches advance through the stack together: at a routed layer the scores of all their real tokens give one
        threshold, with which the batches then pass that layer. What lies below the first routed layer is the same for
        all columns and computed once.
        """
        first, last = min(self.routers), max(self.routers)
        entering = [self._enter(b["input_ids"], None, b.get("attention_mask"), output_routing=False) for b in batches]
        for index in range(first):
            for stream in entering:
                self._step(index, self.layers[index], stream)
        for mode, column in columns:
            streams = [
                replace(s, frame=replace(s.frame, mode=mode, column=column), prior_errors=[], records=[])
                for s in entering
            ]
            for index in range(first, last + 1):
                layer = self.layers[index]
                if isinstance(layer, RoutedLayerMixin):
                    router = layer.router
                    share = router.capacity if column == 0 else CAPACITY_GRID[column - 1]
                    scores = [layer.rank(s.hidden_states, s.surprises, s.frame)[0] for s in streams]
                    router.table(mode)[column] = share_threshold(
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


class DynamicLlamaModel(DynamicModelMixin, LlamaModel):
    """Routed stack of a Llama-type model."""

    config_class = DynamicLlamaConfig
    decision_layer_class = DecisionLlamaLayer
    routed_layer_class = RoutedLlamaLayer


class DynamicQwenModel(DynamicModelMixin, Qwen2Model):
    """Routed stack of a Qwen2 model."""

    config_class = DynamicQwenConfig
    decision_layer_class = DecisionQwenLayer
    routed_layer_class = RoutedQwenLayer
