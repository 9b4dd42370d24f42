"""How to read a model's scores: the figures that they stand for, what these are called, and which tokens they let in.

A score that predicts a cost is the logarithm of a mean square, up to a constant of its layer. It is shown as a root
mean square per element of the hidden state, and so is the threshold: all layers then have one unit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """How to read one kind of score.

    Attributes:
        rule: a sentence: which tokens enter a layer.
        labels: headings of the figures that each token has in a layer, by their names, in order.
        explanation: of the labels: sentences for the note next to the table of layers.
    """

    rule: str
    labels: Mapping[str, str]
    explanation: str = ""


READINGS = {
    "forecast_error": Reading(
        "A layer computes a token where the forecast, a cheap guess of what the layer would give, is predicted to be "
        "off by more than the layer's threshold.",
        {"predicted_cost": "predicted error", "true_cost": "true error"},
        "Predicted error: how far the router expects a token's forecast to be off, root mean square per element; for "
        "routed MLPs, where that changes the loss more it counts more.",
    ),
    "update_size": Reading(
        "A layer computes a token where the predicted size of the token's update is above the layer's threshold.",
        {"predicted_cost": "predicted update", "true_cost": "true update"},
        "Predicted update: how much the router expects the layer to change a token, root mean square per element.",
    ),
    "surprise": Reading(
        "A layer computes a token where the layer below changed the token in a surprising way.",
        {
            "static_surprise": "D_st",
            "change_surprise": "D_ch",
            "s_ce": "S_CE",
            "s_cu": "S_CU",
            "gate": "gate",
            "ce_part": "CE part",
            "true_cost": "true update",
        },
        "by CE: routed tokens whose score owes more to CE than to CU. rank CE: CE's part in the score's variance.",
    ),
}
"""By the name of a score."""
OTHER = Reading(
    "A layer computes the tokens with high scores.",
    {"score": "score", "gate": "gate", "true_cost": "true update"},
)
"""Of every other score, such as Mixture-of-Depths'."""


@dataclass(frozen=True)
class LayerRouting:
    """One routed layer over one text; arrays [T].

    Attributes:
        layer: index in the stack.
        selected: whether the token entered the layer.
        score: float64, the number that is ranked and compared with `threshold`.
        threshold: of the layer; None in `topk` mode.
        shown_threshold: the same in the unit of the figure that the score stands for.
        figures: float64 by name: "gate"; of a score that predicts, "predicted_cost"; of surprise, "static_surprise",
            "change_surprise", "s_ce", "s_cu" and "ce_part"; and next to an oracle "true_cost".
    """

    layer: int
    selected: NDArray[np.bool_]
    score: Floats
    threshold: float | None = None
    shown_threshold: float | None = None
    figures: dict[str, Floats] = field(default_factory=dict)

    @property
    def routed_share(self) -> float:
        """Share of the tokens that entered the layer."""
        return float(self.selected.mean())

    def measures(self) -> dict[str, Floats]:
        """All figures, the score among them."""
        return {"score": self.score, **self.figures}


def layer_routing(model: Any, records: list[Any]) -> LayerRouting:
    """The records of one layer, window after window, as one, with the figures that its scores stand for."""

    def join(name: str) -> Any:
        parts: list[Any] = [getattr(record, name, None) for record in records]
        return None if parts[0] is None else np.concatenate([part[0].cpu().numpy() for part in parts])

    layer, score = records[0].layer, join("scores").astype(np.float64)
    threshold = None if records[0].threshold is None else float(records[0].threshold)
    figures = {name: join(name) for name in ("gate", "static_surprise", "change_surprise", "s_ce", "s_cu")}
    figures = {name: values.astype(np.float64) for name, values in figures.items() if values is not None}
    shown_threshold, scalars = threshold, model.router_scalars()[layer]
    if model.routing != "predictor":  # there scores are logits of the predictor
        offset = scalars.get("cost_offset", math.nan)
        if not math.isnan(offset):
            figures["predicted_cost"] = np.exp((score + offset) / 2)
            shown_threshold = None if threshold is None else math.exp((threshold + offset) / 2)
        if "static_surprise" in figures:
            static, change = figures["static_surprise"], figures["change_surprise"]
            figures["ce_part"] = expected_change_part(score, static, change, scalars)
    return LayerRouting(layer, join("selected"), score, threshold, shown_threshold, figures)


def expected_change_part(score: Floats, static: Floats, change: Floats, scalars: Mapping[str, float]) -> Floats:
    """Which criterion drives a score by surprise: the share of it that the expected change contributes, in [0, 1].

    The ranked score −ln(1 − G) is softplus(a) + softplus(b), a = softplus(β_ce) · CE and b = softplus(β_cu) · CU; the
    part is softplus(a) / score. Above one half CE drove the choice, below it CU did. a is taken from D_st and D_ch
    again, since S_CE and S_CU saturate.

    Args:
        score, static, change: [T], the ranked score, D_st and D_ch.
        scalars: o_ce and beta_ce of the layer's router.
    """
    criterion = static - (change - math.log(scalars["o_ce"] + 1e-10))
    expected = np.logaddexp(0.0, np.logaddexp(0.0, scalars["beta_ce"]) * criterion)
    return np.clip(expected / np.maximum(score, np.finfo(np.float64).tiny), 0.0, 1.0)
