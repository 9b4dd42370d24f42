"""The stack of layers: embeddings → dense, decision and routed layers in turn → norm.

How one batch passes through it, and what makes loading strict. The notable choices:

- backbone parameter names are unchanged, so a dense checkpoint loads straight into a routed class;
- training routes by `topk`; eval routes by the mode saved with the model, `threshold` unless chosen otherwise;
- anything missing from a checkpoint is an error, except what routing adds to a dense one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, RoutedCache
from .calibration import track_thresholds
from .configuration_fields import CAUSAL_MODES
from .layers import DecisionLayerMixin, RoutedLayerMixin, RoutedOutput
from .outputs import RoutedModelOutput, RoutingRecord
from .priors import ZeroLinear
from .routers import Router, RoutingFrame
from .stock import StockModel, StockStack

ADDED_NAMES = ("router", "prior", "predictor")
"""Every parameter and buffer that routing adds has one of these in its name."""


def is_added(name: str) -> bool:
    """Whether a parameter or buffer name is routing's own, not the backbone's."""
    return any(part in name for part in ADDED_NAMES)


class DynamicPreTrainedMixin(StockModel):
    """Initialization and loading, common to the stack and the language model."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            module.reset_parameters()
        elif isinstance(module, ZeroLinear):
            module.weight.zero_()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a routed checkpoint, or a dense one whose routers and priors then start afresh.

        Raises:
            ValueError: keys of the backbone are missing or unexpected; or the checkpoint is a routed one and lacks
                routing parameters (Transformers alone would only warn and initialize them).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
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
class Pass:
    """One batch on its way through the stack."""

    hidden_states: Tensor
    frame: RoutingFrame
    layer_inputs: dict[str, Any]
    positions: Tensor
    surprises: tuple[Tensor, ...] = ()
    prior_errors: list[Tensor] = field(default_factory=list)
    records: list[RoutingRecord] = field(default_factory=list)


class DynamicModelMixin(DynamicPreTrainedMixin, StockStack):
    """The stack of layers.

    Attributes:
        routed: indices of the routed layers.
        training_mode: how training routes, "topk" or "threshold".
        training_capacities: γ of each routed layer while training, where it is not the model's own.
        capacity_override: γ of all routed layers in eval; None: the model's own.
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
        self.training_mode = "topk"
        self.training_capacities: Mapping[int, float] | None = None
        self.capacity_override: float | None = None
        self._thresholds_seen_at: tuple[str, float | None] | None = None
        self._tracked = False
        self.post_init()

    @property
    def routers(self) -> dict[int, Router]:
        """Router of each routed layer, by layer index."""
        return {i: self.layers[i].router for i in self.routed}

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
        passing = self.enter(inputs_embeds, attention_mask, position_ids, cache)
        passing.frame.prepare()
        if passing.frame.mode in CAUSAL_MODES:
            self._require_thresholds(passing.frame.mode)
        for index in range(len(self.layers)):
            self.step(index, passing, **kwargs)
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

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RoutedCache | None = None,
    ) -> Pass:
        """A batch [B, T, D] before its first layer. Positions count real tokens, so padding shifts nothing."""
        (batch, tokens), device = inputs_embeds.shape[:2], inputs_embeds.device
        past = 0 if cache is None else cache.get_seq_length()
        seen = None if attention_mask is None else attention_mask.bool().to(device)
        if seen is not None and not self.training and self.mode in CAUSAL_MODES and bool(seen.all()):
            seen = attention_mask = None  # `generate` always gives a mask; a causal mode waits for the device anyway
        asked = position_ids
        if position_ids is None:
            if seen is None:
                position_ids = torch.arange(past, past + tokens, device=device).unsqueeze(0)
            else:
                position_ids = (seen.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        thresholds = None
        if self.training and self.mode in CAUSAL_MODES:
            # As they are now: tracking moves them before checkpointing runs the layers again.
            thresholds = {i: router.threshold(self.mode).clone() for i, router in self.routers.items()}
        return Pass(
            hidden_states=inputs_embeds,
            positions=position_ids,
            frame=RoutingFrame(
                config=self.config,
                mode=self.mode,
                shape=(batch, tokens),
                device=device,
                capacities=self.capacities(),
                seen=seen,
                past=past,
                thresholds=thresholds,
                noise=torch.rand(batch, tokens, device=device) if self.training and self.explores else None,
            ),
            layer_inputs={
                # By place: Transformers 5.24 renamed the cache's argument. It waits for the device to see whether given
                # positions begin again within a row: ours do not.
                "attention_mask": create_causal_mask(self.config, inputs_embeds, attention_mask, cache, asked),
                CACHE_NAME: cache,
                "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            },
        )

    def step(self, index: int, passing: Pass, **kwargs: Any) -> None:
        """Take a batch through one layer."""
        layer, hidden_states = self.layers[index], passing.hidden_states
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
            passing.hidden_states, static, change, error = layer(hidden_states, **passing.layer_inputs, **kwargs)
            passing.surprises = (static, change)
            passing.prior_errors.append(error)
        else:
            passing.hidden_states = layer(hidden_states, **passing.layer_inputs, **kwargs)

    def route(self, index: int, passing: Pass, frame: RoutingFrame, **kwargs: Any) -> RoutedOutput:
        """What a routed layer makes of a batch before it."""
        how = {"frame": frame, "capacity": frame.capacities[index], **passing.layer_inputs}
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
