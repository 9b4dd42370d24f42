"""Every architecture hyper-parameter of a routed model, defined once.

The config classes inherit these fields, the settings schema derives its `model.*` keys from them, and the
documentation prints their help. Standard library only, so that the command line can read it without torch.

The choices: equation numbers (3.x) are those of the MSc thesis "Dynamic Transformers" (Wieser, UCL 2025);
defaults depart from it where measurements on a pretrained model did (`docs/thesis.md` says which).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ARCHITECTURES = ("dtf", "mod", "random", "layerdrop")
ROUTING_MODES = ("threshold", "predictor", "topk")
CAUSAL_MODES = ("threshold", "predictor")
GATES = ("straight_through", "soft")
MOD_GATES = ("sigmoid", "raw")
KV_TOKENS = ("routed", "all")
PARTS = ("block", "mlp", "attention")
BYPASSES = ("identity", "forecast")
SCORES = ("surprise", "update_size", "forecast_error")
BUDGETS = ("layer", "model")
SURPRISE_SCALES = ("raw", "running")

SURPRISE_ONLY = (
    "prior_factor",
    "prior_dropout",
    "prior_input_gradient",
    "prior_loss_weight",
    "ma_window",
    "ma_skip_sinks",
    "o_ce_init",
    "m_cu_init",
    "beta_ce_init",
    "beta_cu_init",
    "surprise_scale",
)
"""What only routing by surprise reads."""
COST_ONLY = ("score_factor", "budget")
"""What only DTF by predicted costs reads."""
ROUTER_LOSSES = ("router_aux_loss_weight", "router_z_loss_weight")
BY_TOKEN = ("sink_tokens", "kv_tokens", "gate", "mod_gate", "predictor_loss_weight")
"""What only architectures that choose tokens read; layerdrop keeps or leaves out whole layers."""
FORECAST = ("forecast_factor", "forecast_loss_weight")

Number = float | int


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RoutingFields:
    """What a routed model adds to its backbone's configuration."""

    architecture: str = _option(
        "dtf",
        "How tokens are chosen: dtf (by what skipping would lose, model.score), mod (a learned linear score), random "
        "(a fixed random score), or layerdrop (a share γ of the routed layers takes all tokens).",
    )
    capacity: Number | list[Number] = _option(
        0.5, "γ, the share of tokens a routed layer processes; one number, or a list with one per routed layer."
    )
    routed_layers: str | list[int] = _option(
        "alternate", "Which layers route: 'alternate' (every odd layer) or a list of layer indices, from 0."
    )
    dense_edges: int = _option(0, "Layers kept dense at either end when routed_layers is 'alternate'.")
    sink_tokens: int = _option(1, "Leading tokens of a row that are always routed (attention sinks); count toward γ.")
    kv_tokens: str = _option(
        "routed",
        "Tokens whose keys and values a routed layer keeps: its routed tokens, or all (lower loss, no smaller cache).",
    )
    gate: str = _option(
        "straight_through",
        "soft: scale the residual update by the gate; straight_through: scale by 1, keep the gate's gradient.",
    )
    routing: str = _option(
        "threshold",
        "Mode in eval: threshold (causal, calibrated), predictor (causal, a trained guess) or topk (not causal).",
    )
    prior_factor: Number = _option(0.0625, "PriorFFN width as a share of the hidden size (DTF, eq. 3.2).")
    prior_dropout: Number = _option(0.0, "Dropout inside the PriorFFN while training (DTF).")
    prior_input_gradient: bool = _option(
        False, "Let the prior loss pull the backbone through the prior's own input, as eq. 3.4 has it (DTF)."
    )
    prior_loss_weight: Number = _option(0.05, "λ, the weight of the prior loss (DTF, eq. 3.5).")
    ma_window: int = _option(100, "Tokens in the moving average of the static surprise (DTF, eq. 3.9).")
    ma_skip_sinks: bool | None = _option(None, "Leave sink tokens out of that average; unset: if there are any (DTF).")
    o_ce_init: Number = _option(1.025, "Initial o_ce, the offset of the expected change; positive (DTF, eq. 3.8).")
    m_cu_init: Number = _option(1.1, "Initial m_cu, the multiplier of the moving average; positive (DTF, eq. 3.9).")
    beta_ce_init: Number = _option(-0.3, "Initial β_ce, before softplus: sharpness of S_CE (DTF, eq. 3.10).")
    beta_cu_init: Number = _option(-0.6, "Initial β_cu, before softplus: sharpness of S_CU (DTF, eq. 3.11).")
    layer_order: str | list[int] = _option(
        "spread",
        "Which routed layers layerdrop keeps: 'spread' (evenly), or all routed layers, the most important first.",
    )
    routed_part: str = _option(
        "block", "The part of a routed layer that only some tokens enter: the whole block, its mlp or its attention."
    )
    bypass: str = _option(
        "identity",
        "Tokens that skip pass unchanged (identity), or take a linear forecast of the update (forecast).",
    )
    forecast_factor: Number = _option(
        0.0, "Width of a network beside the forecast's linear map, as a share of the hidden size; 0: none."
    )
    forecast_loss_weight: Number = _option(
        10.0, "Weight of the forecast's relative squared error, mean over routed layers; 0: the language model alone."
    )
    score: str = _option(
        "surprise",
        "The score of DTF: the predicted error of the forecast (forecast_error), the predicted size of the update "
        "(update_size), or surprise, which the layer below observes (the thesis).",
    )
    score_factor: Number = _option(
        0.0, "Hidden units of a learned estimate of costs, as a share of the hidden size; 0: a linear one."
    )
    explore: Number = _option(
        0.0,
        "Share of the tokens that skip whose update training computes too, without gradient: score and forecast learn "
        "from it.",
    )
    budget: str = _option(
        "layer",
        "What γ is the share of: each layer's tokens, or those of the whole model, under one threshold for all layers "
        "(update_size and forecast_error).",
    )
    surprise_scale: str = _option(
        "raw", "Unit of DTF's surprise: raw, or running: its moving average, whatever the model's scale."
    )
    mod_gate: str = _option("sigmoid", "MoD's gate: sigmoid (of the score) or raw (the score itself).")
    router_aux_loss_weight: Number = _option(0.0, "Weight of MoD's cross-entropy against its own top-K mask.")
    router_z_loss_weight: Number = _option(0.0, "Weight of MoD's mean squared score.")
    predictor_loss_weight: Number = _option(
        0.0,
        "Above 0: a small network in each routed layer learns to predict its top-K mask (MoD paper: 0.01).",
    )


def by_surprise(values: Mapping[str, Any]) -> bool:
    """Whether tokens are chosen by surprise, which takes a decision layer below each routed one."""
    return values.get("architecture") in (None, "dtf") and values.get("score") in (None, "surprise")


def unread_fields(values: Mapping[str, Any]) -> dict[str, str]:
    """The fields that a model of these values does not read, each with the reason.

    Args:
        values: field name → value, the architecture among them; absent or None: the default.
    """
    architecture = values.get("architecture") or "dtf"
    reason = f"model.architecture is {architecture}"
    dtf, layers = architecture == "dtf", architecture == "layerdrop"
    unread: dict[str, str] = {}
    if not dtf:
        unread |= dict.fromkeys((*SURPRISE_ONLY, *COST_ONLY, "score"), reason)
    elif not by_surprise(values):
        unread |= dict.fromkeys((*SURPRISE_ONLY, "gate"), f"model.score is {values['score']}")
    else:
        unread |= dict.fromkeys(COST_ONLY, "model.score is surprise")
    if architecture != "mod":
        unread |= dict.fromkeys(ROUTER_LOSSES, reason)
    if architecture not in ("mod", "random"):
        unread["mod_gate"] = reason
    unread |= dict.fromkeys(BY_TOKEN, reason) if layers else {"layer_order": reason}
    if values.get("routed_part") == "mlp":
        unread.setdefault("kv_tokens", "model.routed_part is mlp: attention is dense")
    if values.get("bypass") != "forecast":
        unread |= dict.fromkeys(FORECAST, "model.bypass is identity")
        if not dtf or by_surprise(values):
            unread["explore"] = "nothing learns from it without a forecast or a score that predicts"
    return unread


def resolve_routed_layers(routed_layers: str | list[int], dense_edges: int, num_layers: int) -> list[int]:
    """The indices of the layers that route.

    "alternate" takes every odd layer outside the dense edges, and leaves the last layer dense when their
    number is odd. An explicit list stands as it is.
    """
    if not isinstance(routed_layers, str):
        return list(routed_layers)
    return [i for i in range(1, num_layers, 2) if dense_edges <= i < num_layers - dense_edges]


def kept_layers(routed: list[int], capacity: float, order: str | list[int]) -> set[int]:
    """Layerdrop keeps ⌊γ · n + ½⌋ of n routed layers, at least one: evenly spread, or the first of an order."""
    count = max(1, int(capacity * len(routed) + 0.5))
    if isinstance(order, str):
        return {routed[int((i + 0.5) * len(routed) / count)] for i in range(count)}
    return set(order[:count])


def _one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), f"choose one of {', '.join(choices)}"


def _shares(capacity: Any) -> list[Any]:
    return list(capacity) if isinstance(capacity, (list, tuple)) else [capacity]


_COUNT = (lambda value: value >= 0), "must be 0 or more"
_POSITIVE = (lambda value: value > 0.0), "must be positive (it enters a logarithm or scales an average)"

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": _one_of(ARCHITECTURES),
    "routing": _one_of(ROUTING_MODES),
    "gate": _one_of(GATES),
    "mod_gate": _one_of(MOD_GATES),
    "kv_tokens": _one_of(KV_TOKENS),
    "routed_part": _one_of(PARTS),
    "bypass": _one_of(BYPASSES),
    "score": _one_of(SCORES),
    "budget": _one_of(BUDGETS),
    "surprise_scale": _one_of(SURPRISE_SCALES),
    "score_factor": _COUNT,
    "explore": ((lambda value: 0.0 <= value <= 1.0), "must be a share from 0 to 1"),
    "forecast_factor": ((lambda value: 0.0 <= value <= 8.0), "must lie in [0, 8]"),
    "forecast_loss_weight": _COUNT,
    "capacity": (
        lambda value: bool(_shares(value)) and all(0.0 < share <= 1.0 for share in _shares(value)),
        "the share of tokens a routed layer processes lies above 0 and at most at 1",
    ),
    "dense_edges": _COUNT,
    "sink_tokens": _COUNT,
    "ma_window": ((lambda value: value >= 1), "must be 1 or more tokens"),
    "prior_factor": ((lambda value: 0.0 < value <= 8.0), "must be above 0, at most 8"),
    "prior_dropout": ((lambda value: 0.0 <= value < 1.0), "must be in [0, 1)"),
    "o_ce_init": _POSITIVE,
    "m_cu_init": _POSITIVE,
    "prior_loss_weight": _COUNT,
    "router_aux_loss_weight": _COUNT,
    "router_z_loss_weight": _COUNT,
    "predictor_loss_weight": _COUNT,
    "routed_layers": (
        lambda value: value == "alternate" or isinstance(value, (list, tuple)),
        "give 'alternate' or a list of layer indices such as [1, 3, 5]",
    ),
    "layer_order": (
        lambda value: value == "spread" or isinstance(value, (list, tuple)),
        "give 'spread' or a list of all routed layers, the most important first",
    ),
}
"""Field → what a value must fulfill, and the remedy if it does not."""


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def check_routing_fields(values: Mapping[str, Any], num_layers: int | None = None) -> None:
    """Check values of `RoutingFields` and how they fit together.

    Args:
        values: field name → value; fields that are absent or None take their defaults.
        num_layers: layers of the backbone, where known.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    defaults: dict[str, Any] = {f.name: f.default for f in fields(RoutingFields)}
    chosen = defaults | {name: value for name, value in values.items() if value is not None and name in defaults}
    for name, (fulfilled, remedy) in _RULES.items():
        _require(fulfilled(chosen[name]), name, chosen[name], remedy)
    alone = set(values) == {"routing"}  # looked at by itself, before the other fields are known
    _require(
        chosen["routing"] != "predictor" or chosen["predictor_loss_weight"] > 0 or alone,
        "routing",
        chosen["routing"],
        "needs a predictor: set predictor_loss_weight above 0 (such as 0.01), or choose threshold",
    )
    _require(
        chosen["score"] != "forecast_error" or chosen["bypass"] == "forecast" or set(values) == {"score"},
        "score",
        chosen["score"],
        "there is no forecast; set bypass = 'forecast', or score = 'update_size', which needs none",
    )
    _require(
        chosen["budget"] == "layer"
        or (chosen["architecture"] == "dtf" and chosen["score"] != "surprise")
        or set(values) == {"budget"},
        "budget",
        chosen["budget"],
        "one threshold needs scores of one unit in all layers: those of dtf with score = 'update_size' or "
        "'forecast_error'",
    )
    _require(
        chosen["budget"] == "layer" or not isinstance(chosen["capacity"], (list, tuple)),
        "capacity",
        chosen["capacity"],
        "with budget = 'model' give one share: layers share it as they need",
    )
    if num_layers is not None:
        _check_layers(chosen, num_layers)


def _check_layers(chosen: Mapping[str, Any], num_layers: int) -> None:
    """Check what depends on the number of the backbone's layers."""
    routed, capacity = chosen["routed_layers"], chosen["capacity"]
    layers = resolve_routed_layers(routed, chosen["dense_edges"], num_layers)
    cause = "dense_edges" if routed == "alternate" else "routed_layers"
    remedy = f"no layer of {num_layers} would route; lower dense_edges or list routed_layers"
    _require(len(layers) > 0, cause, chosen[cause], remedy)
    _require(
        layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < num_layers,
        "routed_layers",
        routed,
        f"must be increasing layer indices from 0 to {num_layers - 1}",
    )
    neighbors = 0 in layers or set(layers) & {i + 1 for i in layers}
    _require(
        not by_surprise(chosen) or not neighbors,
        "routed_layers",
        routed,
        "a DTF router needs a dense decision layer right below it: leave out layer 0 and neighbors",
    )
    _require(
        not isinstance(capacity, (list, tuple)) or len(capacity) == len(layers),
        "capacity",
        capacity,
        f"a list needs one share for each of the {len(layers)} routed layers",
    )
    if chosen["architecture"] == "layerdrop":
        order = chosen["layer_order"]
        _require(
            not isinstance(capacity, (list, tuple)), "capacity", capacity, "layerdrop takes one share of all its layers"
        )
        _require(
            order == "spread" or sorted(order) == layers,
            "layer_order",
            order,
            f"must name each of the routed layers {layers} once",
        )
