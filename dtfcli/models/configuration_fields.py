"""Every architecture hyper-parameter of a routed model, defined once.

The config classes inherit these fields, the settings schema derives its `model.*` keys from them, and the
documentation prints their help. Standard library only, so that the command line can read it without torch.

The choices: equation numbers (3.x) are those of the MSc thesis "Dynamic Transformers" (Wieser, UCL 2025);
defaults depart from it where measurements on a pretrained model did (`docs/routing.md` says which).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ARCHITECTURES = ("dtf", "mod")
ROUTING_MODES = ("threshold", "predictor", "topk")
CAUSAL_MODES = ("threshold", "predictor")
GATES = ("straight_through", "soft")
MOD_GATES = ("sigmoid", "raw")
KV_TOKENS = ("routed", "all")

DTF_ONLY = (
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
MOD_ONLY = ("mod_gate", "router_aux_loss_weight", "router_z_loss_weight")

Number = float | int


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RoutingFields:
    """What a routed model adds to its backbone's configuration."""

    architecture: str = _option("dtf", "How tokens are chosen: dtf (surprise) or mod (a learned linear score).")
    capacity: Number | list[Number] = _option(
        0.5, "γ, the share of tokens a routed layer processes; one number, or a list with one per routed layer."
    )
    routed_layers: str | list[int] = _option(
        "alternate", "Which layers route: 'alternate' (every odd layer) or a list of layer indices, from 0."
    )
    dense_edges: int = _option(0, "Layers kept dense at either end when routed_layers is 'alternate'.")
    sink_tokens: int = _option(1, "Leading tokens of a row that are always routed (attention sinks); count towards γ.")
    kv_tokens: str = _option(
        "routed",
        "Whose keys and values a routed layer offers: those of its routed tokens, or of all (no cache saving).",
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
    mod_gate: str = _option("sigmoid", "MoD's gate: sigmoid (of the score) or raw (the score itself).")
    router_aux_loss_weight: Number = _option(0.0, "Weight of MoD's cross-entropy against its own top-K mask.")
    router_z_loss_weight: Number = _option(0.0, "Weight of MoD's mean squared score.")
    predictor_loss_weight: Number = _option(
        0.0,
        "Above 0: a small network in each routed layer learns to predict its top-K mask (MoD paper: 0.01).",
    )


def resolve_routed_layers(routed_layers: str | list[int], dense_edges: int, num_layers: int) -> list[int]:
    """The indices of the layers that route.

    "alternate" takes every odd layer outside the dense edges, and leaves the last layer dense when their
    number is odd. An explicit list stands as it is.
    """
    if not isinstance(routed_layers, str):
        return list(routed_layers)
    return [i for i in range(1, num_layers, 2) if dense_edges <= i < num_layers - dense_edges]


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

    for name, allowed in (
        ("architecture", ARCHITECTURES),
        ("routing", ROUTING_MODES),
        ("gate", GATES),
        ("mod_gate", MOD_GATES),
        ("kv_tokens", KV_TOKENS),
    ):
        _require(chosen[name] in allowed, name, chosen[name], f"choose one of {', '.join(allowed)}")

    capacity = chosen["capacity"]
    capacities = capacity if isinstance(capacity, (list, tuple)) else [capacity]
    _require(
        len(capacities) > 0 and all(0.0 < share <= 1.0 for share in capacities),
        "capacity",
        capacity,
        "the share of tokens a routed layer processes lies above 0 and at most at 1",
    )
    for name in ("dense_edges", "sink_tokens"):
        _require(chosen[name] >= 0, name, chosen[name], "must be 0 or more")
    _require(chosen["ma_window"] >= 1, "ma_window", chosen["ma_window"], "must be 1 or more tokens")
    _require(0.0 < chosen["prior_factor"] <= 8.0, "prior_factor", chosen["prior_factor"], "must be above 0, at most 8")
    _require(0.0 <= chosen["prior_dropout"] < 1.0, "prior_dropout", chosen["prior_dropout"], "must be in [0, 1)")
    for name in ("o_ce_init", "m_cu_init"):
        _require(
            chosen[name] > 0.0, name, chosen[name], "must be positive (it enters a logarithm or scales an average)"
        )
    for name in ("prior_loss_weight", "router_aux_loss_weight", "router_z_loss_weight", "predictor_loss_weight"):
        _require(chosen[name] >= 0.0, name, chosen[name], "must be 0 or more")

    alone = set(values) == {"routing"}  # looked at by itself, before the other fields are known
    _require(
        chosen["routing"] != "predictor" or chosen["predictor_loss_weight"] > 0 or alone,
        "routing",
        chosen["routing"],
        "needs a predictor: set predictor_loss_weight above 0 (such as 0.01), or choose threshold",
    )

    routed = chosen["routed_layers"]
    _require(
        routed == "alternate" or isinstance(routed, (list, tuple)),
        "routed_layers",
        routed,
        "give 'alternate' or a list of layer indices such as [1, 3, 5]",
    )
    if num_layers is None:
        return
    layers = resolve_routed_layers(routed, chosen["dense_edges"], num_layers)
    _require(
        len(layers) > 0,
        "routed_layers" if routed != "alternate" else "dense_edges",
        routed if routed != "alternate" else chosen["dense_edges"],
        f"no layer of {num_layers} would route; lower dense_edges or list routed_layers",
    )
    _require(
        layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < num_layers,
        "routed_layers",
        routed,
        f"must be increasing layer indices from 0 to {num_layers - 1}",
    )
    if chosen["architecture"] == "dtf":
        _require(
            0 not in layers and not set(layers) & {i + 1 for i in layers},
            "routed_layers",
            routed,
            "a DTF router needs a dense decision layer right below it: leave out layer 0 and neighbors",
        )
    if isinstance(capacity, (list, tuple)):
        _require(
            len(capacity) == len(layers),
            "capacity",
            capacity,
            f"a list needs one share for each of the {len(layers)} routed layers",
        )
