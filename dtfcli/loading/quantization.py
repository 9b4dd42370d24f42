"""Weights in fewer bits: the backbone's projections in int8 to run a model, in nf4 under adapters to train one.

The notable choices:

- Only linear layers of decoder layers: attention and MLP. Embeddings and head stay as they are, and so does all that
  routing adds: a threshold is a quantile of scores, and scores are what routers make of hidden states.
- Weights only. torchao has the format and kernels of int8 (one scale for each output), bitsandbytes those of nf4
  (QLoRA's).
- Transformers' `TorchAoConfig` would quantize while it opens a folder. Then there is no plain model to compare with,
  and merged adapters and converted models do not pass through it.
- Quantized weights are computed from plain ones whenever a model is opened, and never saved: files hold plain weights.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dtfcli.errors import ConfigError
from dtfcli.models.pretrained import is_added

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Of a weight in nf4: 4 bits, and for each 64 of them a scale in 8 bits, of which 256 share one in float32."""


@dataclass(frozen=True)
class Quantization:
    """The effect of quantizing a model.

    Attributes:
        bytes_before, bytes_after: of all weights of the model.
        tokens: of the sample that both were measured on; 0: nothing was measured.
        loss_before, loss_after: nats per token of the sample.
        routed_before, routed_after: share of the sample's tokens that entered routed layers; None: a dense model.
    """

    bytes_before: int
    bytes_after: int
    kind: str = "int8"
    tokens: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    routed_before: float | None = None
    routed_after: float | None = None


def check_quantize(kind: str) -> None:
    """Raise a ConfigError, before anything is loaded, for an unknown kind or without torchao."""
    if kind != "int8":
        raise ConfigError(f"quantize = {kind!r}: choose int8, or leave it out.")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"quantize = {kind!r}: torchao is not installed; run pip install 'dtfcli[quantize]'.")


def quantize(model: Any) -> Quantization:
    """Put the projections of a model's decoder layers into int8, in place and on their device.

    Args:
        model: dense or routed, without adapters, in the precision that it is to compute in.

    Returns:
        The effect, which is also `quantization_of(model)`.

    Raises:
        ConfigError: the model is quantized already or has no such layers, or torchao is missing.
    """
    check_quantize("int8")
    _check_plain(model)
    layers = dict(projections(model))
    before = weight_bytes(model)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # torchao would change the settings of torch.compile.
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), lambda module, name: name in layers)
    assert all(_is_quantized(layer.weight) for layer in layers.values()), "torchao left out a layer"
    model.quantization = Quantization(before, weight_bytes(model))
    model.save_pretrained = _refuse_to_save
    return model.quantization


def quantization_of(model: Any) -> Quantization | None:
    """The effect of quantizing a model; None: its weights are plain."""
    return getattr(model, "quantization", None)


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers of attention and MLPs; of an adapted one the base alone."""
    for name, module in model.named_modules():
        inside = {"layers", "h"} & set(name.split(".")) and not is_added(name) and ".lora_" not in name
        if inside and isinstance(module, nn.Linear):
            yield name, module


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a weight: itself, or the parts that a quantized one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters; tied ones count once."""
    return sum(part.nbytes for parameter in model.parameters() for part in plain_tensors(parameter))


def numel(parameter: Tensor) -> int:
    """Weights of a parameter: in nf4 two of them share an element."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def _is_quantized(parameter: Tensor) -> bool:
    return hasattr(parameter, "__tensor_flatten__") or not parameter.is_floating_point()


def _check_plain(model: Any) -> None:
    if getattr(model.config, "quantization_config", None) is not None or any(map(_is_quantized, model.parameters())):
        raise ConfigError("quantize = 'int8': the weights of this model are quantized already; leave it out.")
    if getattr(model.base_model, "triton_kernels", False):
        raise ConfigError("quantize = 'int8': our Triton kernels read plain weights; use one of the two.")
    linears = [type(layer) for _, layer in projections(model)]
    if not linears:
        raise ConfigError(f"quantize = 'int8': {type(model).__name__} has no linear maps in its decoder layers.")
    for other in linears:
        if other.forward is not nn.Linear.forward:  # Falcon transposes its weights, which torchao's cannot
            raise ConfigError(f"quantize = 'int8': torchao cannot stand in for {other.__name__}; leave it out.")


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """Takes the place of `save_pretrained`."""
    raise ConfigError("a quantized model is not saved: load it without quantize and save that; it is quantized again.")


def check_nf4() -> None:
    """Raise a ConfigError if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.quantize = 'nf4': bitsandbytes is not installed; run pip install 'dtfcli[qlora]'.")


def quantize_nf4(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Put the projections of a model's decoder layers into nf4, in place; adapters are then trained on top.

    Args:
        model: dense or routed, without adapters, in float32.
        device: where the quantized layers go.
        dtype: precision of their products.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    check_nf4()
    for name, layer in list(projections(model)):
        weight = layer.weight.data
        frozen = _nf4_class()(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
        )
        frozen.weight = type(frozen.weight)(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=frozen
        )
        if layer.bias is not None:
            frozen.bias = layer.bias
        model.set_submodule(name, frozen.to(device).train(layer.training))


@cache
def _nf4_class() -> Any:
    """The linear layer of bitsandbytes, with a state dict like any other: it is quantized before one is loaded."""
    import bitsandbytes

    class FrozenNF4(bitsandbytes.nn.Linear4bit):
        """A linear layer in nf4."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # In eval mode it would pack weights anew for a CPU's kernels, which fails where 64 does not divide inputs.
            self.support_avx512bf16_for_cpu = False

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            tensors: dict[str, Any] = {}
            super()._save_to_state_dict(tensors, prefix, keep_vars)
            destination |= {name: x for name, x in tensors.items() if name in (f"{prefix}weight", f"{prefix}bias")}

    return FrozenNF4
