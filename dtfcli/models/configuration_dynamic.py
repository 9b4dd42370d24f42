"""Configurations of routed models: the stock ones plus `RoutingFields`, made of the rows of `families`."""

from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import strict

from .configuration_fields import RoutingConfigMixin
from .families import FAMILIES, Family

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


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
