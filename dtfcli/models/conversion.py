"""Dense ↔ routed, without losing or copying a weight."""

import copy as copy_module
from collections.abc import Iterable
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from .configuration_dynamic import CONFIGS
from .configuration_fields import STRUCK, RoutingFields, check_field, has_routed_mlps
from .families import FAMILIES
from .modeling_dynamic import MODELS
from .modeling_routed_mlp import RoutedBase, RoutedCausalLM, decoder_layers, inner_linears, routed_classes
from .pretrained import is_added, is_routed
from .savings import capacity_for

ROUTING_FIELD_NAMES = tuple(field.name for field in dataclass_fields(RoutingFields))


def convert(
    dense: PreTrainedModel,
    architecture: str = "dtf",
    capacity: float | list[float] | None = None,
    *,
    copy: bool = False,
    **config_fields: Any,
) -> PreTrainedModel:
    """A routed model with the weights of a dense one; with `routed_part` "mlp" see `route_mlps`.

    New routers, priors and forecasts are initialized from torch's global generator. At capacity 1 with the
    straight-through gate the result computes exactly what the dense model does.

    Args:
        dense: a model of one of the `FAMILIES`; left intact.
        architecture: one of `ARCHITECTURES`.
        capacity: γ, one number or one per routed layer; None: 0.5, for MLPs what saves 10 % of the FLOPs.
        copy: give the routed model tensors of its own; otherwise it shares the dense model's.
        config_fields: any other field of `RoutingFields`.

    Returns:
        The routed class of the family, such as `DynamicLlamaForCausalLM`; same device, dtype and train/eval mode.

    Raises:
        ValueError: another kind of model, capped logits, an unknown field or a wrong value, by name.
    """
    if has_routed_mlps({**config_fields, "architecture": architecture}):
        return route_mlps(dense, capacity=capacity, copy=copy, architecture=architecture, **config_fields)
    config = routed_config(dense.config, architecture=architecture, capacity=capacity, **config_fields)
    return _transplant(dense, MODELS[dense.config.model_type], config, copy)


def route_mlps(
    dense: PreTrainedModel,
    save: float | None = None,
    *,
    capacity: float | list[float] | None = None,
    copy: bool = False,
    **config_fields: Any,
) -> PreTrainedModel:
    """A model whose MLPs route, of any decoder whose layers have an `mlp`; see `modeling_routed_mlp`.

    Nothing is fitted yet: `fit_routing` comes next. Layers whose MLP is a mixture of experts, or that have none, stay
    dense. At γ = 1 the result computes bit for bit what the dense model does.

    Args:
        dense: left intact.
        save: the share of a forward pass's FLOPs that routing leaves out; γ follows from it (see `savings`). 0.1 where
            neither it nor `capacity` is given.
        capacity: γ, one number or one per routed layer, in place of `save`.
        copy: give the routed model tensors of its own; otherwise it shares the dense model's.
        config_fields: other fields of `RoutingFields`, such as `routed_layers` and `forecast_maps`.

    Raises:
        ValueError: no decoder of Transformers, none of its MLPs can route, a saving beyond reach, an unknown field or a
            wrong value, by name.
    """
    stock = type(dense)
    if is_routed(dense):
        raise ValueError(f"model is a {stock.__name__}: its layers route already. to_dense gives the dense model")
    if getattr(transformers, stock.__name__, None) is not stock or not stock.__name__.endswith("ForCausalLM"):
        raise ValueError(f"model is a {stock.__name__}: MLPs route in models of Transformers called …ForCausalLM")
    if not hasattr(dense.config, "num_hidden_layers"):  # of several parts (Fuyu)
        raise ValueError(f"model is a {stock.__name__} of several parts: convert the language model inside")
    if clashes := [name for name in dense.state_dict() if is_added(name)]:
        raise ValueError(f"{stock.__name__} cannot be converted: its {clashes[0]} is called as what routing adds")
    if save is not None and capacity is not None:
        raise ValueError(f"save = {save!r} and capacity = {capacity!r} both say how much is left out: give one")
    target = routed_classes(stock)
    fields: dict[str, Any] = {"routed_part": "mlp", **config_fields}
    config = _checked_config(target.config_class, dense.config, {**fields, "capacity": 1.0})
    layers = _fit_layers(dense, config.routed_layer_indices)
    if layers != config.routed_layer_indices:
        fields["routed_layers"] = layers
    config = _checked_config(
        target.config_class, dense.config, {**fields, "capacity": 1.0 if capacity is None else capacity}
    )
    model: Any = _transplant(dense, target, config, copy)
    if capacity is None:
        config.capacity = capacity_for(model, 0.1 if save is None else save)
        model.set_routing()
    return model


def _fit_layers(dense: PreTrainedModel, wanted: list[int]) -> list[int]:
    """The wanted layers whose MLPs can route; ValueError if there are none."""
    layers = decoder_layers(dense)
    if len(layers) <= wanted[-1]:  # of an encoder and a decoder
        raise ValueError(f"{type(dense).__name__} has {len(layers)} decoder layers, fewer than its configuration says")
    unfit = unfit_layers(layers, dense.config.hidden_size)
    if fit := [layer for layer in wanted if layer not in unfit]:
        return fit
    reasons = "; ".join(dict.fromkeys(unfit[layer] for layer in wanted))
    raise ValueError(f"no MLP of {type(dense).__name__} can route. Of layers {wanted[0]} to {wanted[-1]}: {reasons}")


def unfit_layers(layers: Iterable[nn.Module], size: int) -> dict[int, str]:
    """The layers whose MLP cannot route, each with the reason."""
    reasons = {}
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module):
            reasons[index] = "it has no `mlp`"
        elif any(hasattr(mlp, name) for name in ("experts", "router", "gate")):
            reasons[index] = "its MLP is a mixture of experts"
        elif len(signature(mlp.forward).parameters) != 1:
            reasons[index] = "its MLP takes more than hidden states"
        else:
            try:
                inner_linears(mlp, size)
            except ValueError as error:
                reasons[index] = str(error)
    return reasons


def to_dense(model: PreTrainedModel, *, copy: bool = False) -> PreTrainedModel:
    """The stock model inside a routed one: its backbone, bit for bit, without what routing adds.

    Args:
        model: a routed model; left intact.
        copy: give the dense model tensors of its own; otherwise they are shared.

    Raises:
        ValueError: the model is not a routed one.
    """
    if not is_routed(model):
        raise ValueError(f"model is a {type(model).__name__}: to_dense takes a routed model")
    if isinstance(model, RoutedCausalLM):
        stock = type(model).__mro__[type(model).__mro__.index(RoutedBase) + 1]
        return _transplant(model, stock, type(model.config).stock(**_config_values(model.config)), copy)
    family = FAMILIES[model.config.model_type.removeprefix("dynamic_")]
    config = family.dense_config(**_config_values(model.config))
    return _transplant(model, family.dense_model, config, copy)


def routed_config(dense_config: Any, **config_fields: Any) -> Any:
    """The routed configuration for a dense one; checks family and fields.

    Raises:
        ValueError: see `convert`.
    """
    model_type = dense_config.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} cannot be converted. "
            f"dtf knows {', '.join(sorted(FAMILIES))}; CONTRIBUTING.md says how to add a backbone"
        )
    if getattr(dense_config, "final_logit_softcapping", None) or getattr(dense_config, "attn_logit_softcapping", None):
        raise ValueError(f"model type {model_type!r} with capped logits cannot be converted: dtf has no cap")
    if getattr(dense_config, "use_bidirectional_attention", False):
        raise ValueError(f"model type {model_type!r} with bidirectional attention is not causal")
    return _checked_config(CONFIGS[model_type], dense_config, config_fields)


def _checked_config(config_class: type[Any], dense_config: Any, config_fields: dict[str, Any]) -> Any:
    """A routed configuration with the values of a dense one; ValueError for an unknown field or a wrong value."""
    for name in config_fields:
        if name in STRUCK:
            check_field(name, config_fields[name])
        if name not in ROUTING_FIELD_NAMES:
            close = get_close_matches(name, ROUTING_FIELD_NAMES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The fields are: {', '.join(ROUTING_FIELD_NAMES)}"
            raise ValueError(f"{name} is not a field of a routed model.{hint}")
    set_fields = {name: value for name, value in config_fields.items() if value is not None}
    try:
        return config_class(**_config_values(dense_config), **set_fields)
    except Exception as error:
        # Strict dataclasses wrap what a validator raised; the validator's own words are the useful ones.
        raise ValueError(str(error.__cause__ or error)) from error


def _config_values(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    # A GGUF base was dequantized while loading: its quantization_config would forbid saving.
    of_source = ("model_type", "architectures", "transformers_version", "auto_map", "quantization_config")
    for name in (*ROUTING_FIELD_NAMES, *of_source):
        values.pop(name, None)
    values["attn_implementation"] = config._attn_implementation
    return values


def _transplant(
    source: PreTrainedModel, target_class: type, config: Any, copy: bool, state: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """Build `target_class` around the backbone tensors of `source`; only routing's own parameters are new."""
    if state is None:
        state = {name: tensor for name, tensor in source.state_dict().items() if not is_added(name)}
    if copy:
        state = {name: tensor.clone() for name, tensor in state.items()}
    offloaded = [name for name, tensor in state.items() if tensor.is_meta]
    if 0 < len(offloaded) < len(state):  # all: a dry run
        raise ValueError(
            f"{offloaded[0]} is offloaded (device_map), so it cannot be read: open the model on one device"
        )
    device, dtype = source.device, source.dtype
    with torch.device("meta"):
        target = target_class(config)
    missing, unexpected = target.load_state_dict(state, strict=False, assign=True)
    lost = [name for name in missing if not is_added(name) and name not in target.all_tied_weights_keys]
    if lost or unexpected:
        raise ValueError(f"backbone weights do not fit {target_class.__name__}: missing {lost}, not known {unexpected}")
    for module in target.modules():
        fresh = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in fresh):
            loaded = {p: p.data for p in module.parameters(recurse=False) if not p.is_meta}
            module._apply(lambda tensor: torch.empty_like(tensor, device=device), recurse=False)
            target._init_weights(module)
            for parameter, values in loaded.items():  # an embedding with a scale: the weight came, the scale is made
                parameter.data = values
    target.tie_weights()
    for name, parameter in target.named_parameters():
        if is_added(name):
            parameter.requires_grad_(True)
            if "router" not in name:
                parameter.data = parameter.data.to(dtype)
    config.dtype = dtype
    target.generation_config = copy_module.deepcopy(source.generation_config)
    return target.train(source.training)


def load_dense(
    path: str | Path,
    *,
    dtype: Any = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config: Any = None,
) -> PreTrainedModel:
    """A dense base model from a folder, a Hub id, or a `.gguf` file (dequantized).

    Args:
        config: its configuration, where it has been read already.

    Raises:
        ValueError: weights are missing, or are not known to the model.
        OSError, ValueError: as Transformers reports them.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if config is not None:
        options["config"] = config
    if str(path).endswith(".gguf"):
        file = Path(path)
        model = load_whole(str(file.parent), gguf_file=file.name, **options)
        # Says "gguf", and would make save_pretrained refuse: the weights are plain tensors now.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        vars(model).update(hf_quantizer=None, is_quantized=False)
        return model
    return load_whole(str(path), revision=revision, **options)


def load_whole(path: str, **options: Any) -> Any:
    """A saved language model with all weights: Transformers draws missing ones at random and only warns.

    Raises:
        ValueError: weights are missing, or are not known to the model.
    """
    _tie_as_whole(options.get("config"))
    loaded: Any = _auto_class(options.get("config")).from_pretrained(path, output_loading_info=True, **options)
    model, info = loaded
    for problem, names in (("missing", info["missing_keys"]), ("not known to the model", info["unexpected_keys"])):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" and more" if len(names) > 3 else "")
            raise ValueError(f"Weights are {problem}: {some}. The files are damaged or of another model.")
    return text_part(model)


def from_config(config: Any, **options: Any) -> Any:
    """A language model with random weights; options as of Transformers' `from_config`."""
    _tie_as_whole(config)
    return text_part(_auto_class(config).from_config(config, **options))


def _auto_class(config: Any) -> Any:
    """What opens a language model, or one that sees as well."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _tie_as_whole(config: Any) -> None:
    """The outer configuration of a model that sees as well says whether embeddings are tied; the text's may differ."""
    if hasattr(config, "tie_word_embeddings"):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings


def text_part(model: Any) -> Any:
    """The language model inside one that sees as well, with its tensors; any other model as it is.

    Raises:
        ValueError: Transformers has no class for the language model alone.
    """
    config = model.config.get_text_config()
    if type(config) is type(model.config):
        return model
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if stock is None:
        raise ValueError(f"Transformers has no language model of {type(config).__name__} alone")
    _tie_as_whole(model.config)
    config = copy_module.deepcopy(config)
    parts = {stock.base_model_prefix: model.get_decoder(), "lm_head": model.get_output_embeddings()}
    state = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    return _transplant(model, stock, config, copy=False, state=state)
