"""The classes of every backbone: decision layer, routed layer, stack and language model, made of a row of `families`.

Each class is a stock class with ours in front, as if it were written

    class RoutedLlamaLayer(RoutedLayerMixin, LlamaDecoderLayer): ...

and can be imported from here by its name: `from dtfcli.models.modeling_dynamic import DynamicLlamaForCausalLM`.
"""

import sys
from typing import TYPE_CHECKING, Any

from .causal_lm import DynamicCausalLMMixin
from .configuration_dynamic import CONFIGS
from .families import FAMILIES, Family
from .layers import DecisionLayerMixin, RoutedLayerMixin
from .stack import DynamicModelMixin

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def _made(name: str, mixin: type, stock: type, **attributes: Any) -> type[Any]:
    """A class of this file: the mixin in front of the stock class."""
    attributes |= {"__module__": __name__, "__doc__": f"{mixin.__doc__}\n\nFor `{stock.__name__}`."}
    made: type[Any] = type(name, (mixin, stock), attributes)
    globals()[name] = made
    return made


def _language_model(family: Family, config: type[Any]) -> type[Any]:
    """The routed language model of a backbone, and the classes that it consists of."""
    name = family.name
    stock_layer = getattr(sys.modules[family.dense_stack.__module__], f"{family.stock}DecoderLayer")
    decision = _made(f"Decision{name}Layer", DecisionLayerMixin, stock_layer)
    routed = _made(f"Routed{name}Layer", RoutedLayerMixin, stock_layer, first_norm=family.first_norm)
    common = {
        "config_class": config,
        "_no_split_modules": [layer.__name__ for layer in (stock_layer, decision, routed)],
    }
    stack = _made(
        f"Dynamic{name}Model",
        DynamicModelMixin,
        family.dense_stack,
        decision_layer_class=decision,
        routed_layer_class=routed,
        rotary_by_kind=family.rotary_by_kind,
        **common,
    )
    model = _made(f"Dynamic{name}ForCausalLM", DynamicCausalLMMixin, family.dense_model, stack_class=stack, **common)
    # Saving copies these files beside the weights and names the classes in `auto_map`.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    return model


MODELS: dict[str, type[Any]] = {
    model_type: _language_model(family, CONFIGS[model_type]) for model_type, family in FAMILIES.items()
}
"""The routed language models, by the model type of the dense configuration."""
