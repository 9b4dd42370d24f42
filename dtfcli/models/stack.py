"""The stack of layers: embeddings → dense, decision and routed layers in turn → norm.

How one batch passes through it. The notable choices:

- training routes by `topk`; eval routes by the mode saved with the model, `threshold` unless chosen otherwise;
- training never waits for the device. Eval does in every routed layer on a CPU, where that is free and saves time;
  elsewhere once a pass, and never for a single token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, RoutedCache
from .calibration import track_thresholds
from .configuration_fields import CAUSAL_MODES
from .entrance import EntranceMixin, Pass
from .layers import DecisionLayerMixin, RoutedLayerMixin, RoutedOutput
from .outputs import RoutedModelOutput, RoutingRecord
from .pretrained import DynamicPreTrainedMixin
from .routers import Router, RoutingFrame
from .triton_kernels import available


class DynamicModelMixin(DynamicPreTrainedMixin, EntranceMixin):
    """The stack of layers.

    Attributes:
        routed: indices of the routed layers.
        kinds: of each layer's attention: with or without a sliding window.
        training_mode: how training routes, "topk" or "threshold".
        training_capacities: γ of each routed layer while training, where it is not the model's own.
        capacity_override: γ of all routed layers in eval; None: the model's own.
        looks: whether each routed layer of a causal pass looks at how many tokens enter, so that none is computed for
            nothing; None: on a CPU, where looking is free. Else a pass looks once, at its end, whether the slots were
            enough, and is repeated if they were not; the pass of a single token never looks.
        triton_kernels: whether the Triton kernels are used (`use_triton_kernels`).
    """

    decision_layer_class: type
    routed_layer_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index in config.routed_layer_indices:
            self.layers[index] = self.routed_layer_class(config, index)
            if config.by_surprise:
                self.layers[index - 1] = self.decision_layer_class(config, index - 1)
        self.routed = tuple(config.routed_layer_indices)
        self.kinds = tuple(config.layer_kind(index) for index in range(len(self.layers)))
        self.training_mode = "topk"
        self.training_capacities: Mapping[int, float] | None = None
        self.capacity_override: float | None = None
        self.looks: bool | None = None
        self.triton_kernels = False
        self._thresholds_seen_at: tuple[str, float | None] | None = None
        self._tracked = False
        self.post_init()

    @property
    def routers(self) -> dict[int, Router]:
        """Router of each routed layer, by layer index."""
        return {i: self.layers[i].router for i in self.routed}

    def use_triton_kernels(self, used: bool = True) -> None:
        """Decode with our Triton kernels where the cache is static, on a GPU. Not saved.

        Raises:
            ValueError: they cannot run here, or weights are no plain tensors.
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
            input_ids: int64 [B, T]; or inputs_embeds [B, T, D].
            attention_mask: [B, T], 0 for padding on either side.
            position_ids: [B or 1, T]; by default real tokens are counted from 0.
            past_key_values, cache: the same under its two names, a `RoutedCache`; None: with `use_cache` a new one.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training and self.config.routing != "topk":
            cache = RoutedCache(self.config)
        self.check_inputs(input_ids, inputs_embeds, attention_mask, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.mode in CAUSAL_MODES:
            self._require_thresholds(self.mode)
        looks = self._looks_at(inputs_embeds, kwargs)
        given = (inputs_embeds, attention_mask, position_ids, cache)
        passing = self._run(self.enter(*given, looks=looks), **kwargs)
        if not self._holds(passing, attention_mask):
            if cache is not None:
                cache.crop(-inputs_embeds.shape[1])
            passing = self._run(self.enter(*given), **kwargs)
        if cache is not None and cache.static is not None:
            cache.static.advance()
        if self.training:
            track_thresholds(passing.records, self.routers, passing.frame)
        return RoutedModelOutput(
            last_hidden_state=self.norm(passing.hidden_states),
            prior_errors=tuple(passing.prior_errors),
            routing=tuple(passing.records),
            real=passing.frame.real,
            sinks=passing.frame.sinks,
            positions=passing.positions,
            **{CACHE_NAME: cache},
        )

    def _run(self, passing: Pass, **kwargs: Any) -> Pass:
        """Take a batch through all layers."""
        passing.frame.prepare()
        for index in range(len(self.layers)):
            self.step(index, passing, **kwargs)
        return passing

    def _looks_at(self, inputs_embeds: Tensor, asked: Mapping[str, Any]) -> bool:
        """Whether the layers of a pass over these look at how many tokens enter."""
        free = inputs_embeds.device.type == "cpu" if self.looks is None else self.looks
        if free or self.training or self.mode not in CAUSAL_MODES:
            return True
        # What is captured on the way has to be that of a single run.
        captured = ("output_hidden_states", "output_attentions")
        return any(asked.get(name, getattr(self.config, name, False)) for name in captured)

    def _holds(self, passing: Pass, attention_mask: Tensor | None) -> bool:
        """Whether what was assumed without a look was right: every token had a slot, and a row alone has no padding."""
        frame = passing.frame
        if frame.slots_per_row is None or frame.shape[1] == 1:
            return True
        assumed = [record.selected.sum(1).max() <= frame.slots_per_row[record.layer] for record in passing.records]
        if attention_mask is not None and frame.seen is None:
            assumed.append(attention_mask.to(frame.device).all())
        return bool(torch.stack(assumed).all()) if assumed else True

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
        """The routing mode of the next pass.

        A budget of the whole model has no top-K of a layer: training routes by the tracked threshold once there is one,
        except while γ is on its way.
        """
        if not self.training:
            return self.config.routing
        shared = self.config.budget == "model" and self.training_capacities is None
        return "threshold" if shared and self._has_tracked else self.training_mode

    @property
    def _has_tracked(self) -> bool:
        """Whether training has a threshold of its own; looked at until it has."""
        if not self._tracked:
            self._tracked = not any(bool(router.threshold("threshold").isnan()) for router in self.routers.values())
        return self._tracked

    @property
    def explores(self) -> bool:
        """Whether training looks at tokens that skip."""
        return self.config.explore > 0 and (self.config.has_forecast or self.config.predicts_cost)

    def capacities(self) -> Mapping[int, float]:
        """γ of each routed layer in the next pass."""
        if self.training and self.training_capacities is not None:
            return self.training_capacities
        return self.config.layer_capacities(None if self.training else self.capacity_override)

    def step(self, index: int, passing: Pass, **kwargs: Any) -> None:
        """Take a batch through one layer."""
        layer, hidden_states = self.layers[index], passing.hidden_states
        inputs = passing.layer_inputs[self.kinds[index]]
        if isinstance(layer, RoutedLayerMixin):
            static, change = passing.surprises or (None, None)
            out = self.route(index, passing, passing.frame, **kwargs)
            passing.hidden_states = out.hidden_states
            passing.records.append(
                RoutingRecord(
                    layer=index,
                    scores=out.ranked,
                    selected=out.selected,
                    gate=out.gate,
                    threshold=out.threshold,
                    static_surprise=static,
                    change_surprise=change,
                    s_ce=out.s_ce,
                    s_cu=out.s_cu,
                    predictor_logits=out.predictor_logits,
                    weight=out.weight,
                    cost=out.cost,
                    miss=out.miss,
                )
            )
        elif isinstance(layer, DecisionLayerMixin):
            passing.hidden_states, static, change, error = layer(hidden_states, **inputs, **kwargs)
            passing.surprises = (static, change)
            passing.prior_errors.append(error)
        else:
            passing.hidden_states = layer(hidden_states, **inputs, **kwargs)

    def route(self, index: int, passing: Pass, frame: RoutingFrame, **kwargs: Any) -> RoutedOutput:
        """What a routed layer makes of a batch before it."""
        inputs = passing.layer_inputs[self.kinds[index]]
        how = {"frame": frame, "capacity": frame.capacities[index], **inputs}
        return RoutedOutput(*self.layers[index](passing.hidden_states, *passing.surprises, **how, **kwargs))

    def _require_thresholds(self, mode: str) -> None:
        """Refuse thresholds that were never calibrated. Looked at once for each capacity: it waits for the device."""
        asked = None if self.training else self.capacity_override
        if self._thresholds_seen_at == (mode, asked):
            return
        for index, router in self.routers.items():
            if router.threshold(mode, asked).isnan():
                capacity = router.capacity if asked is None else asked
                raise ValueError(
                    f"routing = {mode!r} at capacity {capacity:g}: layer {index} is not calibrated. Call "
                    "model.calibrate(batches) on text of the kind you will use, or choose routing 'topk' (not causal)"
                )
        self._thresholds_seen_at = (mode, asked)

    def forget_checks(self) -> None:
        """Look at the thresholds again before the next causal pass: they, or the capacity asked for, changed."""
        self._thresholds_seen_at, self._tracked = None, False
