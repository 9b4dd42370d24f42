"""What a routed model returns beyond the stock outputs."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class RoutingRecord(NamedTuple):
    """How one routed layer treated each token.

    Attributes:
        layer: index of the layer in the stack.
        scores: float32 [B, T], what is ranked and compared with the threshold: the router's scores, or in `predictor`
            mode the predictor's logits.
        selected: bool [B, T], True where the token entered the layer.
        gate: float32 [B, T], the soft gate: G (surprise), σ(r) or r (MoD), 1 (predicted costs).
        threshold: float32 0-d, in the causal modes.
        static_surprise, change_surprise: float32 [B, T], D_st and D_ch (surprise).
        s_ce, s_cu: float32 [B, T], the two criteria after their sigmoids (surprise).
        predictor_logits: float32 [B, T], while a predictor trains or routes.
        weight: float32 [B, T], while a forecast or a predicted cost trains: what each token counts; 0 where its update
            is not known; for explored tokens, how many others each stands for.
        cost: float32 [B, T], what skipping loses, where it is known: ln(‖Δ‖² / D) or, with the forecast f,
            ln(‖Δ − f‖² / D).
        miss: float32 [B, T], ‖Δ − f‖² / ‖Δ‖², where it is known.
        before, after: [B, T, D], what every token is before and after the routed part, where the context asks for it.
    """

    layer: int
    scores: Tensor
    selected: Tensor
    threshold: Tensor | None
    gate: Tensor
    s_ce: Tensor | None = None
    s_cu: Tensor | None = None
    predictor_logits: Tensor | None = None
    static_surprise: Tensor | None = None
    change_surprise: Tensor | None = None
    weight: Tensor | None = None
    cost: Tensor | None = None
    miss: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None


@dataclass
class RoutedModelOutput(BaseModelOutputWithPast):
    """Output of the stack without its head.

    Attributes:
        prior_errors: float32 [B, T] for each decision layer, ‖prior − stop_grad(posterior)‖² / D.
        routing: a `RoutingRecord` for each routed layer.
        is_token, sinks: bool [B, T] or None: positions that are no padding, tokens that are sinks.
        positions: int64 [B or 1, T], rotary positions: real tokens counted from 0.
    """

    prior_errors: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingRecord, ...] | None = None
    is_token: Tensor | None = None
    sinks: Tensor | None = None
    positions: Tensor | None = None


@dataclass
class RoutedCausalLMOutput(CausalLMOutputWithPast):
    """Output of a routed causal language model.

    Attributes:
        loss: what is minimized: `lm_loss` plus the weighted auxiliary losses while training, `lm_loss` in eval.
        lm_loss: mean next-token cross-entropy, nats.
        prior_loss: mean prior error over real tokens without sinks and over decision layers, unweighted (DTF).
        router_loss: what routers learn from besides the language model: auxiliary losses of MoD's, the squared error of
            predicted costs, the predictor's; weighted and summed.
        forecast_loss: relative squared error of the forecasts, mean over tokens and routed layers, unweighted.
        logits: [B, T, V]; None while training with labels, where they are never held whole.
        routing: a `RoutingRecord` for each routed layer, when `output_routing` asks for it.
    """

    lm_loss: Tensor | None = None
    prior_loss: Tensor | None = None
    router_loss: Tensor | None = None
    forecast_loss: Tensor | None = None
    routing: tuple[RoutingRecord, ...] | None = None
