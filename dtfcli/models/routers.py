"""The router of each way of choosing, by its name in `WAYS`."""

from typing import Any

from .configuration_fields import WAYS, Way
from .cost import ForecastErrorRouter, UpdateSizeRouter
from .layerdrop import LayerdropRouter
from .mod import ModRouter, RandomRouter
from .router import Router
from .surprise import SurpriseRouter

ROUTERS: dict[str, type[Router]] = {
    "surprise": SurpriseRouter,
    "update_size": UpdateSizeRouter,
    "forecast_error": ForecastErrorRouter,
    "mod": ModRouter,
    "random": RandomRouter,
    "layerdrop": LayerdropRouter,
}


def router_of(config: Any, layer_idx: int) -> Router:
    """The router of a layer."""
    return ROUTERS[config.way](config, layer_idx)


def register_way(name: str, way: Way, router: type[Router]) -> None:
    """Add a way of choosing from outside: models can then be converted to it, trained and run.

    A saved model of it opens only where it was registered first.
    """
    WAYS[name] = way
    ROUTERS[name] = router
