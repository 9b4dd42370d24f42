"""Initialization and loading, common to the stack and the language model.

Backbone parameter names are unchanged, so a dense checkpoint loads straight into a routed class. Anything missing from
a checkpoint is an error, except what routing adds to a dense one.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .forecast import ZeroLinear
from .router import Router
from .stock import StockModel

ADDED_NAMES = ("router", "forecast", "prior", "predictor")
"""Every parameter and buffer that routing adds has one of these in its name."""

ROUTED_TYPES = ("dynamic_", "routed_")
"""What the model types of routed models begin with: of those with routed blocks, of those with routed MLPs."""

RENAMED = {r"\.forecast_prior\.": ".forecast.", r"\.router\.level$": ".router.cost_offset"}
"""Names in folders that earlier versions saved, as regular expressions, and what they are now."""


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Give the weights, but not the routers', a precision; the configuration says so."""
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def is_added(name: str) -> bool:
    """Whether a parameter or buffer name is routing's own, not the backbone's."""
    return any(part in name for part in ADDED_NAMES)


def is_routed(model: Any) -> bool:
    """Whether a model is a routed one of ours, also inside of a wrapper like peft's; else it is a stock one."""
    return hasattr(model, "set_routing")


class DynamicPreTrainedMixin(StockModel):
    """Initialization and loading, common to the stack and the language model."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            module.reset_parameters()
        elif isinstance(module, ZeroLinear):
            module.weight.zero_()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a routed checkpoint, or a dense one whose routers and priors then start afresh.

        Raises:
            ValueError: keys of the backbone are missing or unexpected; or the checkpoint is a routed one and lacks
                routing parameters (Transformers alone would only warn and initialize them).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = RENAMED | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        vars(model).pop("_weight_conversions", None)  # Transformers would save the names of earlier versions again
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        if kwargs.get("gguf_file") is not None or pretrained_model_name_or_path is None:
            from_dense = True
        else:
            hub = {
                k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
            }
            source, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            from_dense = not str(source.get("model_type", "")).startswith("dynamic_")
        lost = sorted(key for key in missing if not (from_dense and is_added(key)))
        if lost or unexpected:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights do not fit {cls.__name__}. Missing: "
                f"{_some(lost)}; not known: {_some(sorted(unexpected))}. The file is damaged or of another model; "
                "nothing was initialized in their place."
            )
        return (model, info) if wants_info else model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
