"""A routed language model: the stack with its head, losses and routing controls, whatever the backbone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .cache import CACHE_NAME, RoutedCache
from .calibration import calibrate_layers
from .configuration_fields import CAUSAL_MODES, ROUTING_MODES
from .fitting import fit_layers
from .losses import auxiliary_losses, causal_lm_loss, embedded_with_head, for_head
from .outputs import RoutedCausalLMOutput, RoutedModelOutput
from .pretrained import DynamicPreTrainedMixin
from .router import CAPACITY_GRID
from .stock import StockLM


class DynamicCausalLMMixin(DynamicPreTrainedMixin, StockLM):
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
        num_items_in_batch: Tensor | float | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> RoutedCausalLMOutput | tuple[Any, ...]:
        """Next-token logits, losses and, on request, what was routed.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, D].
            attention_mask: [B, T], 0 for padding on either side.
            past_key_values, cache: two names for a `RoutedCache`; None: with `use_cache` a new one.
            labels: int64 [B, T], not shifted; -100 is ignored.
            logits_to_keep: compute logits of the last N positions only, or of these; 0: of all. As in Transformers.
            output_routing: return a `RoutingRecord` for each routed layer.
            output_logits: False never materializes the logits; None: they are left out while training with labels.
            num_items_in_batch: targets in the whole update; losses are then sums over it instead of means over
                this batch, the auxiliary ones scaled alike.

        Raises:
            ValueError: `threshold` routing without calibration; a foreign cache; a mask that does not cover all tokens.
        """
        cache = past_key_values if cache is None else cache
        asked = labels is not None or output_routing or output_logits is False or return_dict is False or kwargs
        if input_ids is not None and not asked and self._can_replay(input_ids, cache):
            replayed = self._replay(input_ids, attention_mask, position_ids, cache)
            return RoutedCausalLMOutput(logits=replayed, **{CACHE_NAME: cache})
        head = self.lm_head.weight
        if labels is not None and inputs_embeds is None and input_ids is not None:
            inputs_embeds, head = embedded_with_head(self.model.embed_tokens, self.lm_head, input_ids)
            input_ids = None
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.model(**text, inputs_embeds=inputs_embeds, use_cache=use_cache, cache=cache, **kwargs)
        if output_logits is None:
            output_logits = labels is None or not self.training
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = for_head(outputs.last_hidden_state, self.config)
        logits = self.lm_head(hidden_states[:, kept]) if output_logits else None
        losses = {} if labels is None else self._losses(outputs, head, labels, num_items_in_batch)
        result = RoutedCausalLMOutput(
            **losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing if output_routing else None,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return result if return_dict is not False else result.to_tuple()

    def _can_replay(self, input_ids: Tensor, cache: Any) -> bool:
        """Whether this is a token of each row on top of a static cache, on a GPU, without gradients."""
        fits = isinstance(cache, RoutedCache) and cache.length is not None and cache.get_seq_length() > 0
        return fits and input_ids.shape[1] == 1 and input_ids.is_cuda and not torch.is_grad_enabled()

    def _replay(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: RoutedCache
    ) -> Tensor:
        """Logits [B, 1, V] of the next token in fixed shapes."""
        self.model.check_inputs(input_ids, None, attention_mask, cache)
        state = cache.to_static(None if attention_mask is None else attention_mask[:, :-1].bool())
        if position_ids is None:
            position_ids = state.filled.sum(1, keepdim=True)

        def step(ids: Tensor, positions: Tensor) -> Tensor:
            outputs = self.model(input_ids=ids, position_ids=positions, cache=cache)
            return self.lm_head(for_head(outputs.last_hidden_state, self.config))

        choices = (self.model.mode, self.model.capacity_override, self.model.triton_kernels)
        return state.run(step, input_ids, position_ids.expand(len(input_ids), 1), choices)

    def _losses(
        self, outputs: RoutedModelOutput, head: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None
    ) -> dict[str, Any]:
        """The language-model loss, the auxiliary ones, and as "loss" what training minimizes: their weighted sum."""
        assert outputs.last_hidden_state is not None
        hidden_states = for_head(outputs.last_hidden_state, self.config)
        lm_loss = causal_lm_loss(hidden_states, head, labels, num_items_in_batch)
        share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
        losses = auxiliary_losses(self.config, self.model.routers, outputs, share)
        weights = {"prior_loss": self.config.prior_loss_weight, "forecast_loss": self.config.forecast_loss_weight}
        total = lm_loss
        for name, loss in losses.items():  # times 0, too: several processes count on every parameter's gradient
            if self.training and loss is not None:
                total = total + weights.get(name, 1.0) * loss
        return {"loss": total, "lm_loss": lm_loss, **losses}

    @property
    def routing(self) -> str:
        """The routing mode of eval: "threshold", "predictor" or "topk"."""
        return self.config.routing

    @property
    def causal_routing(self) -> str:
        """The routing mode of eval where that is causal, else "threshold"."""
        return self.routing if self.routing in CAUSAL_MODES else "threshold"

    @property
    def capacity(self) -> float | list[float]:
        """γ in eval: the one asked for with `set_routing`, else the model's own."""
        override = self.model.capacity_override
        return self.config.capacity if override is None else override

    @property
    def capacity_override(self) -> float | None:
        """γ asked for with `set_routing`; None: the model's own."""
        return self.model.capacity_override

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers that route."""
        return list(self.model.routers)

    @property
    def is_calibrated(self) -> bool:
        """Whether every routed layer knows a threshold for the model's own capacity."""
        capacities = self.config.layer_capacities()
        routers = self.model.routers.items()
        return not any(r.threshold_at("threshold", capacities[i], capacities[i]).isnan() for i, r in routers)

    @property
    def is_fitted(self) -> bool:
        """Whether forecasts and predicted costs, where there are any, are no longer as conversion made them."""
        layers = [self.model.layers[i] for i in self.model.routers]
        scores = all(bool(layer.router.cost_offset.isfinite()) for layer in layers if self.config.learns_scores)
        return scores and all(bool(layer.forecast.linear.weight.any()) for layer in layers if self.config.has_forecast)

    def set_routing(self, mode: str, capacity: float | None = None) -> None:
        """Choose how tokens are routed in eval.

        Args:
            mode: "threshold" (causal), "predictor" (causal, where one was trained) or "topk" (the training rule over
                the whole sequence; not causal). Saved with the model.
            capacity: γ in (0, 1] for all routed layers; None: the model's own. Not saved.

        Raises:
            ValueError: unknown mode, `predictor` without one, or a capacity outside (0, 1].
        """
        if mode not in ROUTING_MODES:
            raise ValueError(f"routing = {mode!r}: choose one of {', '.join(ROUTING_MODES)}")
        if mode == "predictor" and not self.config.has_predictor:
            raise ValueError(
                "routing = 'predictor': this model has no predictor. Train one with predictor_loss_weight above 0, or "
                "route by 'threshold', which needs none"
            )
        if capacity is not None and not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity = {capacity!r}: the share of routed tokens lies above 0 and at most at 1")
        self.config.routing = mode
        self.model.capacity_override = None if capacity is None else float(capacity)
        self.model.forget_checks()

    def set_training_routing(self, mode: str) -> None:
        """Choose how tokens are routed while training: "topk" (the default) or, for the end of a run, "threshold".

        With "threshold" the model trains on what eval will do: rows route as many tokens as score above the thresholds
        that training tracks. Not saved.

        Raises:
            ValueError: unknown mode.
        """
        if mode not in ("topk", "threshold"):
            raise ValueError(f"routing = {mode!r}: while training choose 'topk' or 'threshold'")
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

    def calibrate(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        capacities: Iterable[float] | None = None,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure the thresholds of causal routing on text of the kind that will be routed.

        For each γ one forward pass over all batches: each routed layer takes the quantile of the scores it sees, the
        layers below it already thresholded, because they change what it sees. Eight thousand tokens and more, short
        and long rows mixed, give shares within two points of γ. Use training text, never what will be reported on.

        Args:
            batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].
            capacities: γ of the grid to measure besides the model's own; None: the whole grid (twelve passes), so that
                any γ can be asked for; (): the model's own alone.
            on_pass: called with the number of passes that are done, and with the number of all.

        Raises:
            ValueError: no batches, or a capacity that is not in the grid.
        """
        on_device = self._on_device(batches)
        grid = list(CAPACITY_GRID if capacities is None else capacities)
        for capacity in grid:
            if capacity not in CAPACITY_GRID:
                raise ValueError(f"capacities has {capacity!r}: choose from {', '.join(map(str, CAPACITY_GRID))}")
        if not all(router.by_token for router in self.model.routers.values()):
            return  # layers kept or left out whole: there is nothing to measure
        targets = [("threshold", capacity) for capacity in (None, *grid)]
        if self.config.has_predictor:  # at the model's own capacity it has a rule of its own, σ(p) > 0.5
            targets += [("predictor", capacity) for capacity in grid]
        was_training = self.training
        self.eval()
        calibrate_layers(self.model, on_device, targets, on_pass)
        self.train(was_training)

    def fit_routing(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        on_layer: Callable[[int, int], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Fit forecasts and predicted costs by least squares, and calibrate the model's own γ on the way.

        One pass over the text, each layer computed for every token, before any training. For a pretrained backbone;
        `fitting` has the equations. Thirty tokens for each unit of the hidden size are enough.

        Args:
            batches: as in `calibrate`.
            on_layer: called with how many layers are done, and how many there are.
            device: that computes, a layer at a time; None: where the model is.

        Raises:
            ValueError: no batches, or nothing to fit: no forecast, and no score that predicts.
        """
        if not self.config.learns_from_updates:
            raise ValueError(
                "there is nothing to fit: convert with bypass = 'forecast', or score 'update_size' or 'forecast_error'"
            )
        on_device = self._on_device(batches)
        was_training = self.training
        self.eval()
        fit_layers(self.model, on_device, self.device if device is None else device, on_layer)
        self.train(was_training)

    def _on_device(self, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Batches of text on the model's device."""
        names = ("input_ids", "attention_mask")
        on_device = [{k: v.to(self.device) for k, v in batch.items() if k in names} for batch in batches]
        if not on_device:
            raise ValueError("batches is empty: give it text, some thousand tokens of it")
        for batch in on_device:
            self.model.check_inputs(batch["input_ids"], None, batch.get("attention_mask"), None)
        return on_device

    def router_scalars(self) -> dict[int, dict[str, float]]:
        """For each routed layer its own threshold and, for DTF, o_ce, m_cu, beta_ce and beta_cu."""
        return {
            index: router.scalars() | ({"threshold": router.threshold.item()} if router.by_token else {})
            for index, router in self.model.routers.items()
        }

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuse Transformers' continuous batching, `generate_batch` included, with the reason and the remedy."""
        raise ValueError(
            "continuous batching (init_continuous_batching, generate_batch) does not work with routed models: its "
            "paged cache holds every token in every layer, a routed layer only those that it routed. Use "
            "generate(input_ids, attention_mask=…) with a batch of prompts padded on the left, or on the command line "
            "dtf generate --prompts FILE --batch-size N, or dtf serve without --continuous-batching"
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: Any
    ) -> None:
        """Give `generate` a `RoutedCache`: assisted decoding asks for it before the first forward."""
        if self.config.routing == "topk":
            raise ValueError("routing 'topk' sees the whole sequence: generate with routing 'threshold'")
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: routed models have their own "
                "cache; leave it out, or choose 'static' for decoding in fixed shapes"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            fixed = generation_config.cache_implementation == "static"
            model_kwargs[CACHE_NAME] = RoutedCache(self.config, sizes[-1] if fixed else None)
