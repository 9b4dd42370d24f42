"""Configurations of models with routed MLPs: any stock one with `RoutingFields`, made when it is asked for.

`RoutedLlamaConfig` is `LlamaConfig` with the fields, and so for every decoder of Transformers: there is no list.
"""

from typing import TYPE_CHECKING, Any

import transformers
from transformers.configuration_utils import strict

from .configuration_fields import RoutingConfigMixin

PREFIX = "routed_"
"""What the model type of such a configuration begins with."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`RoutedLlamaConfig` and the like, from the stock class that the name contains."""
        stock = getattr(transformers, name.removeprefix("Routed"), None)
        if not name.startswith("Routed") or not name.endswith("Config") or stock is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return routed_config_class(stock)


def routed_config_class(stock: type[Any]) -> type[Any]:
    """The configuration of a stock class's model with routed MLPs."""
    name = f"Routed{stock.__name__}"
    if name not in globals():
        attributes = {
            "__module__": __name__,
            "__doc__": f"`{stock.__name__}` with `RoutingFields`; MLPs route.",
            "model_type": PREFIX + stock.model_type,
            "routed_part": "mlp",
            "bypass": "forecast",
            "score": "forecast_error",
            "routed_layers": "inner",
            "__annotations__": {"routed_part": str, "bypass": str, "score": str, "routed_layers": str | list[int]},
        }
        globals()[name] = strict(type(name, (RoutingConfigMixin, stock), attributes))
    return globals()[name]
