"""Every architecture hyper-parameter of a routed model, defined once.

The config classes inherit these fields, the settings schema derives its `model.*` keys from them, and the
documentation prints their help. Standard library only, so that the command line can read it without torch.

The choices: equation numbers (3.x) are those of the MSc thesis "Dynamic Transformers" (Wieser, UCL 2025);
defaults depart from it where measurements on a pretrained model did (`docs/thesis.md` says which).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Any as StockConfig
else:
    StockConfig = object

ROUTING_MODES = ("threshold", "predictor", "topk")
CAUSAL_MODES = ("threshold", "predictor")


@dataclass(frozen=True)
class Way:
    """One way of choosing tokens: a row of `WAYS`. Its score, loss and fit are in a file of its own (`routers`)."""

    reads: tuple[str, ...]
    """The fields that only some ways read."""
    architecture: str = "dtf"
    """`architecture` of the models that choose so; those of "dtf" differ in their `score`."""
    needs_decision_layer: bool = False
    """Whether it observes what the layer below does: that layer is dense and measures it."""
    needs_forecast: bool = False
    """Whether it is about the forecast, so that there has to be one."""
    learns_from_updates: bool = False
    """Whether it is fitted to the updates of tokens, explored ones included."""


_OF_TOKENS = ("sink_tokens", "kv_tokens", "predictor_loss_weight")
_OF_SURPRISE = (
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
)

WAYS: dict[str, Way] = {
    "surprise": Way(("score", *_OF_TOKENS, "gate", *_OF_SURPRISE), needs_decision_layer=True),
    "update_size": Way(("score", *_OF_TOKENS, "explore"), learns_from_updates=True),
    "forecast_error": Way(("score", *_OF_TOKENS, "explore"), learns_from_updates=True, needs_forecast=True),
    "mod": Way((*_OF_TOKENS, "gate", "mod_gate", "router_aux_loss_weight", "router_z_loss_weight"), "mod"),
    "random": Way((*_OF_TOKENS, "gate", "mod_gate"), "random"),
    "layerdrop": Way(("layer_order",), "layerdrop"),
}
"""By name: the `score` of DTF, the `architecture` of the others."""

MLP_DEFAULTS: dict[str, Any] = {
    "routed_part": "mlp",
    "bypass": "forecast",
    "score": "forecast_error",
    "routed_layers": "inner",
    "capacity": 0.78,
}
"""Defaults of routed MLPs, where they differ; conversion computes the capacity that saves 10 % of the FLOPs."""

STRUCK: dict[str, tuple[Any, str]] = {
    "budget": ("layer", "every layer has a γ of its own; give capacity a list where they should differ"),
    "forecast_factor": (0.0, "forecasts are linear"),
    "score_factor": (0.0, "predicted costs are linear"),
    "surprise_scale": ("raw", "surprise is never rescaled"),
}
"""Fields that earlier versions had: the value that meant nothing, and why every other is gone."""

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
        "alternate",
        "Which layers route: 'alternate' (every odd layer), 'inner' (all but the first three and the last), or a list.",
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
    prior_factor: Number = _option(0.0625, "PriorFFN width as a share of the hidden size (surprise, eq. 3.2).")
    prior_dropout: Number = _option(0.0, "Dropout inside the PriorFFN while training (surprise).")
    prior_input_gradient: bool = _option(
        False, "Let the prior loss pull the backbone through the prior's own input, as eq. 3.4 has it (surprise)."
    )
    prior_loss_weight: Number = _option(0.05, "λ, the weight of the prior loss (surprise, eq. 3.5).")
    ma_window: int = _option(100, "Tokens in the moving average of the static surprise (surprise, eq. 3.9).")
    ma_skip_sinks: bool | None = _option(
        None, "Leave sink tokens out of that average; unset: if there are any (surprise)."
    )
    o_ce_init: Number = _option(1.025, "Initial o_ce, the offset of the expected change; positive (surprise, eq. 3.8).")
    m_cu_init: Number = _option(
        1.1, "Initial m_cu, the multiplier of the moving average; positive (surprise, eq. 3.9)."
    )
    beta_ce_init: Number = _option(-0.3, "Initial β_ce, before softplus: sharpness of S_CE (surprise, eq. 3.10).")
    beta_cu_init: Number = _option(-0.6, "Initial β_cu, before softplus: sharpness of S_CU (surprise, eq. 3.11).")
    layer_order: str | list[int] = _option(
        "spread",
        "Which routed layers layerdrop keeps: 'spread' (evenly), or all routed layers, the most important first.",
    )
    routed_part: str = _option(
        "block", "The part of a routed layer that only some tokens enter: the whole block, or its mlp alone."
    )
    bypass: str = _option(
        "identity",
        "Tokens that skip pass unchanged (identity), or take a linear forecast of the update (forecast).",
    )
    forecast_maps: int = _option(
        8, "Linear maps of a forecast, one for each cluster of directions that tokens have (routed MLPs)."
    )
    forecast_width: Number = _option(
        0.04, "Share of the MLP's neurons that the forecast computes besides its linear map (routed MLPs)."
    )
    forecast_loss_weight: Number = _option(
        10.0, "Weight of the forecast's relative squared error, mean over routed layers; 0: the language model alone."
    )
    score: str = _option(
        "surprise",
        "The score of DTF: the predicted error of the forecast (forecast_error), the predicted size of the update "
        "(update_size), or surprise, which the layer below observes (the thesis).",
    )
    explore: Number = _option(
        0.0,
        "Share of the tokens that skip whose update training computes too, without gradient: score and forecast learn "
        "from it.",
    )
    mod_gate: str = _option("sigmoid", "MoD's gate: sigmoid (of the score) or raw (the score itself).")
    router_aux_loss_weight: Number = _option(0.0, "Weight of MoD's cross-entropy against its own top-K mask.")
    router_z_loss_weight: Number = _option(0.0, "Weight of MoD's mean squared score.")
    predictor_loss_weight: Number = _option(
        0.0,
        "Above 0: a small network in each routed layer learns to predict its top-K mask (MoD paper: 0.01).",
    )


def way_of(values: Mapping[str, Any]) -> str:
    """The name in `WAYS` of how these values choose tokens; absent or None: the default."""
    architecture = values.get("architecture") or RoutingFields.architecture
    default = MLP_DEFAULTS["score"] if has_routed_mlps(values) else RoutingFields.score
    return (values.get("score") or default) if architecture == "dtf" else architecture


def has_routed_mlps(values: Mapping[str, Any]) -> bool:
    """Whether models of these values are stock ones with routed MLPs; MoD routes blocks, whatever the part is."""
    return values.get("routed_part") == "mlp" and values.get("architecture") != "mod"


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """All of `RoutingFields` by name: values that are absent or None are the defaults."""
    defaults = {f.name: f.default for f in fields(RoutingFields)} | (MLP_DEFAULTS if has_routed_mlps(values) else {})
    return defaults | {name: value for name, value in values.items() if value is not None and name in defaults}


def unread_fields(values: Mapping[str, Any]) -> dict[str, str]:
    """The fields that a model of these values does not read, each with the reason.

    Args:
        values: field name → value, the architecture among them; absent or None: the default.
    """
    values = with_defaults(values)
    name = way_of(values)
    if name not in WAYS:  # `check_field` says what is wrong
        return {}
    way, some_read = WAYS[name], {field for other in WAYS.values() for field in other.reads}
    dtf_reads = {field for other in WAYS.values() if other.architecture == "dtf" for field in other.reads}
    by_architecture = f"model.architecture is {way.architecture}"
    unread = {
        field: f"model.score is {name}" if way.architecture == "dtf" and field in dtf_reads else by_architecture
        for field in sorted(some_read - set(way.reads))
    }
    if values["bypass"] == "forecast":
        unread.pop("explore", None)
    else:
        unread["forecast_loss_weight"] = "model.bypass is identity"
        if "explore" in unread:
            unread["explore"] = "nothing learns from it without a forecast or a score that predicts"
    if has_routed_mlps(values):
        unread |= dict.fromkeys((*_OF_TOKENS, "gate", "mod_gate"), "model.routed_part is mlp: a token enters by itself")
        learns = "model.routed_part is mlp: forecasts learn from the language model's loss alone"
        return unread | dict.fromkeys(("explore", "forecast_loss_weight"), learns)
    if way.architecture == "mod":
        unread["routed_part"] = "model.architecture is mod, which routes blocks"
    return unread | dict.fromkeys(
        ("forecast_maps", "forecast_width"), "model.routed_part is block: one map is its forecast"
    )


def resolve_routed_layers(routed_layers: str | list[int], dense_edges: int, num_layers: int) -> list[int]:
    """The indices of the layers that route.

    "alternate" takes every odd layer outside the dense edges, and leaves the last layer dense when their
    number is odd. "inner" takes all but the first three and the last. An explicit list stands as it is.
    """
    if not isinstance(routed_layers, str):
        return list(routed_layers)
    if routed_layers == "inner":
        return list(range(3, num_layers - 1))
    return [i for i in range(1, num_layers, 2) if dense_edges <= i < num_layers - dense_edges]


def kept_layers(routed: list[int], capacity: float, order: str | list[int]) -> set[int]:
    """Layerdrop keeps ⌊γ · n + ½⌋ of n routed layers, at least one: evenly spread, or the first of an order."""
    count = max(1, int(capacity * len(routed) + 0.5))
    if isinstance(order, str):
        return {routed[int((i + 0.5) * len(routed) / count)] for i in range(count)}
    return set(order[:count])


Rule = tuple[Callable[[Any], bool], str]


def _one_of(choices: Iterable[str]) -> Rule:
    return (lambda value: value in choices), f"choose one of {', '.join(choices)}"


def _shares(capacity: Any) -> list[Any]:
    return list(capacity) if isinstance(capacity, (list, tuple)) else [capacity]


_COUNT = (lambda value: value >= 0), "must be 0 or more"
_POSITIVE = (lambda value: value > 0.0), "must be positive (it enters a logarithm or scales an average)"

_RULES: dict[str, Rule] = {
    "routing": _one_of(ROUTING_MODES),
    "gate": _one_of(("straight_through", "soft")),
    "mod_gate": _one_of(("sigmoid", "raw")),
    "kv_tokens": _one_of(("routed", "all")),
    "routed_part": _one_of(("block", "mlp")),
    "bypass": _one_of(("identity", "forecast")),
    "explore": ((lambda value: 0.0 <= value <= 1.0), "must be a share from 0 to 1"),
    "forecast_loss_weight": _COUNT,
    "forecast_maps": ((lambda value: value >= 1), "must be 1 or more"),
    "forecast_width": ((lambda value: 0.0 <= value < 1.0), "must be a share of neurons, at least 0 and below 1"),
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
        lambda value: value in ("alternate", "inner") or isinstance(value, (list, tuple)),
        "give 'alternate', 'inner' or a list of layer indices such as [1, 3, 5]",
    ),
    "layer_order": (
        lambda value: value == "spread" or isinstance(value, (list, tuple)),
        "give 'spread' or a list of all routed layers, the most important first",
    ),
}
"""Field → what a value must fulfill, and the remedy if it does not."""


def architectures() -> list[str]:
    """The values of `architecture`."""
    return list(dict.fromkeys(way.architecture for way in WAYS.values()))


def scores() -> list[str]:
    """The values of `score`."""
    return [name for name, way in WAYS.items() if way.architecture == "dtf"]


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def check_field(name: str, value: Any) -> Any:
    """Check one field by itself, whatever the others are; None stands for its default. Returns the value.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    if value is None:
        return None
    if name in STRUCK:
        _require(value == STRUCK[name][0], name, value, f"this field is gone, since {STRUCK[name][1]}")
    known = {"architecture": architectures, "score": scores}
    rule = _one_of(known[name]()) if name in known else _RULES.get(name)
    if rule is not None:
        fulfilled, remedy = rule
        _require(fulfilled(value), name, value, remedy)
    return value


def check_fields(values: Mapping[str, Any], num_layers: int | None = None) -> None:
    """Check values of `RoutingFields`, and how they fit together.

    Args:
        values: field name → value; fields that are absent or None take their defaults.
        num_layers: layers of the backbone, where known.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    chosen = with_defaults(values)
    for name, value in chosen.items():
        check_field(name, value)
    part, of_blocks = chosen["routed_part"], chosen["architecture"] == "mod"
    _require(part == "block" or not of_blocks, "routed_part", part, "mod routes whole blocks; leave it out")
    if has_routed_mlps(chosen):
        for name, needed in (("score", "forecast_error"), ("bypass", "forecast"), ("routing", "threshold")):
            _require(chosen[name] == needed, name, chosen[name], f"routed MLPs take {needed!r} alone; leave it out")
    _require(
        chosen["routing"] != "predictor" or chosen["predictor_loss_weight"] > 0,
        "routing",
        chosen["routing"],
        "needs a predictor: set predictor_loss_weight above 0 (such as 0.01), or choose threshold",
    )
    _require(
        chosen["bypass"] == "forecast" or not WAYS[way_of(chosen)].needs_forecast,
        "score",
        chosen["score"],
        "there is no forecast; set bypass = 'forecast', or score = 'update_size', which needs none",
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
        not neighbors or not WAYS[way_of(chosen)].needs_decision_layer,
        "routed_layers",
        routed,
        "a router by surprise needs a dense decision layer right below it: leave out layer 0 and neighbors",
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


class RoutingConfigMixin(RoutingFields, StockConfig):
    """Validation and derived values; mixed in front of a stock config class."""

    def validate_routing(self) -> None:
        """Run by Transformers after construction; raises ValueError naming field, value and remedy."""
        for name in STRUCK:  # of a model that an earlier version saved
            if name in vars(self):
                check_field(name, self.__dict__.pop(name))
        check_fields({f.name: getattr(self, f.name) for f in fields(RoutingFields)}, self.num_hidden_layers)

    @property
    def routed_layer_indices(self) -> list[int]:
        """Layers that route, in increasing order."""
        return resolve_routed_layers(self.routed_layers, self.dense_edges, self.num_hidden_layers)

    @property
    def skips_sinks_in_average(self) -> bool:
        """Whether the moving average of eq. 3.9 leaves the sink tokens out."""
        return self.sink_tokens > 0 if self.ma_skip_sinks is None else self.ma_skip_sinks

    @property
    def has_predictor(self) -> bool:
        """Whether routed layers have a predictor, for `predictor` routing."""
        return self.predictor_loss_weight > 0

    @property
    def way(self) -> str:
        """How tokens are chosen: a name in `WAYS`."""
        return way_of(vars(self))

    @property
    def needs_decision_layers(self) -> bool:
        """Whether the layers below the routed ones observe what routers read."""
        return WAYS[self.way].needs_decision_layer

    @property
    def has_forecast(self) -> bool:
        """Whether tokens that skip a layer take a forecast of its update."""
        return self.bypass == "forecast"

    @property
    def learns_scores(self) -> bool:
        """Whether scores predict what skipping loses."""
        return WAYS[self.way].learns_from_updates

    @property
    def learns_from_updates(self) -> bool:
        """Whether something is fitted to the updates of tokens: scores or forecasts."""
        return self.has_forecast or self.learns_scores

    @property
    def explores(self) -> bool:
        """Whether training computes the update of some tokens that skip."""
        return self.explore > 0 and self.learns_from_updates

    @property
    def keeps_every_key(self) -> bool:
        """Whether routed layers offer the keys and values of all tokens, routed or not."""
        return self.kv_tokens == "all" and self.architecture != "layerdrop" and self.routed_part == "block"

    def layer_kind(self, layer: int) -> str:
        """What Transformers calls the attention of a layer: "full_attention", or with a window "sliding_attention"."""
        kinds = getattr(self, "layer_types", None)
        if kinds:
            return kinds[layer]
        return "full_attention" if getattr(self, "sliding_window", None) is None else "sliding_attention"  # Mistral

    def window(self, layer: int) -> int | None:
        """Positions that a layer attends to, the token's own included; None: all."""
        return self.sliding_window if self.layer_kind(layer) == "sliding_attention" else None

    def layer_capacities(self, capacity: float | list[float] | None = None) -> dict[int, float]:
        """γ of each routed layer, by its index; layerdrop's is 1 (kept) or 0 (left out).

        Args:
            capacity: in place of the model's own.
        """
        routed, share = self.routed_layer_indices, self.capacity if capacity is None else capacity
        if self.architecture == "layerdrop":
            kept = kept_layers(routed, float(share), self.layer_order)  # type: ignore[arg-type]  # checked: one number
            return {layer: float(layer in kept) for layer in routed}
        shares = share if isinstance(share, (list, tuple)) else [share] * len(routed)
        return dict(zip(routed, map(float, shares), strict=True))
