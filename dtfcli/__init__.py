"""Dynamic Transformers: decoder models that spend their layers only on the tokens that need them.

    import dtfcli
    model = dtfcli.load_model("outputs/…/final_model")
    tokenizer = dtfcli.load_tokenizer("outputs/…/final_model")

Everything listed below is imported on first use, so that `import dtfcli` and `dtf --help` are quick. After it,
`transformers.AutoModelForCausalLM.from_pretrained` opens routed models too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dtfcli.registration import register_auto_classes

if TYPE_CHECKING:
    from dtfcli.evaluation.runner import evaluate
    from dtfcli.experiment import train
    from dtfcli.generation import generate
    from dtfcli.loading.load import load_model, load_tokenizer
    from dtfcli.models.configuration_dynamic import DynamicLlamaConfig, DynamicQwenConfig
    from dtfcli.models.conversion import convert, route_mlps, to_dense
    from dtfcli.models.modeling_dynamic import DynamicLlamaForCausalLM, DynamicQwenForCausalLM
    from dtfcli.settings import load_settings

__version__ = "0.2.0"

_HOMES = {
    "evaluate": "dtfcli.evaluation.runner",
    "load_model": "dtfcli.loading.load",
    "load_tokenizer": "dtfcli.loading.load",
    "generate": "dtfcli.generation",
    "DynamicLlamaConfig": "dtfcli.models.configuration_dynamic",
    "DynamicQwenConfig": "dtfcli.models.configuration_dynamic",
    "convert": "dtfcli.models.conversion",
    "route_mlps": "dtfcli.models.conversion",
    "to_dense": "dtfcli.models.conversion",
    "DynamicLlamaForCausalLM": "dtfcli.models.modeling_dynamic",
    "DynamicQwenForCausalLM": "dtfcli.models.modeling_dynamic",
    "load_settings": "dtfcli.settings",
    "train": "dtfcli.experiment",
}

__all__ = [
    "DynamicLlamaConfig",
    "DynamicLlamaForCausalLM",
    "DynamicQwenConfig",
    "DynamicQwenForCausalLM",
    "__version__",
    "convert",
    "evaluate",
    "generate",
    "load_model",
    "load_settings",
    "load_tokenizer",
    "route_mlps",
    "to_dense",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dtfcli' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_auto_classes()
