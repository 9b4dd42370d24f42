"""Configurations of models with routed MLPs: any stock one with `RoutingFields`, made when it is asked for.

`RoutedLlamaConfig` is `LlamaConfig` with the fields, and so for every decoder of Transformers: there is no list.
"""

from typing import TYPE_CHECKING, Any

import transformers
from transformers.configuration_utils import strict

from .configuration_fields import MLP_DEFAULTS, RoutingConfigMixin, RoutingFields

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
            "stock": stock,
            "__annotations__": {name: RoutingFields.__annotations__[name] for name in MLP_DEFAULTS},
            **MLP_DEFAULTS,
        }
        globals()[name] = strict(type(name, (RoutingConfigMixin, stock), attributes))
    return globals()[name]
