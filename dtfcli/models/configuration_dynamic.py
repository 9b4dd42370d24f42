"""Configurations of routed models: the stock ones plus `RoutingFields`, made of the rows of `families`."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import strict

from .configuration_fields import (
    STRUCK,
    WAYS,
    RoutingFields,
    check_field,
    check_fields,
    kept_layers,
    resolve_routed_layers,
    way_of,
)
from .families import FAMILIES, Family
from .stock import StockConfig

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


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
        return self.routed_part == "mlp" or (self.kv_tokens == "all" and self.architecture != "layerdrop")

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


def _made(model_type: str, family: Family) -> type[Any]:
    """The routed configuration of a backbone, as a class of this file."""
    name, stock = f"Dynamic{family.name}Config", family.dense_config
    attributes = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with `RoutingFields`.",
        "model_type": f"dynamic_{model_type}",
        "norm_eps": property(lambda config: getattr(config, family.eps)),
    }
    made: type[Any] = strict(type(name, (RoutingConfigMixin, stock), attributes))
    globals()[name] = made
    return made


CONFIGS: dict[str, type[Any]] = {model_type: _made(model_type, family) for model_type, family in FAMILIES.items()}
"""The routed configurations, by the model type of the dense one."""
