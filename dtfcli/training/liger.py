"""`training.kernels`: the library that runs the element-wise work of the backbone's blocks while training.

"torch": Transformers' own operations, some ten for a norm. "liger": RMSNorm, SwiGLU and GEGLU as one Triton kernel
each, of the Liger library (`pip install 'dtfcli[liger]'`), on GPUs. Matrix products and attention have good kernels
without it, the language-model loss has its own here, and the modules that routing adds keep torch's operations.

The families write the same norm, x / rms(x) · w, in three ways, of which a kernel has to take the right one:

- Llama, Qwen2, Qwen3, Mistral, SmolLM3, Granite: normalized in float32, multiplied in the model's type;
- OLMo 2: all of it in float32;
- Gemma 3: all of it in float32, with 1 + w in place of w.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtfcli.errors import ConfigError


class _Norm(NamedTuple):
    """How a family writes its norm: the number added to w, and Liger's name for the types in between."""

    offset: float
    casting: str


_FAMILIES = {
    **dict.fromkeys(("Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Granite"), _Norm(0.0, "llama")),
    "Olmo2": _Norm(0.0, "gemma"),
    "Gemma3": _Norm(1.0, "gemma"),
}
"""By the beginning of the names of Transformers' classes, as in `LlamaRMSNorm` and `LlamaMLP`."""
_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""Liger's GEGLU has the approximation by tanh; these three are ways to write it."""


def check_liger(kernels: str, device: torch.device) -> None:
    """Raise ConfigError where Liger is not installed, or does not run on the device."""
    if kernels != "liger":
        return
    if device.type not in ("cuda", "xpu") or not sys.platform.startswith("linux"):
        raise ConfigError(
            f"training.kernels = 'liger': its kernels run on GPUs (cuda, xpu) under Linux, and this is "
            f"{device.type} on {sys.platform}; leave it at 'torch'."
        )
    if find_spec("liger_kernel") is None:
        raise ConfigError("training.kernels = 'liger': Liger is not installed; run pip install 'dtfcli[liger]'.")


def use_liger(model: nn.Module) -> list[str]:
    """Let the norms and feed-forward blocks of a model, routed or stock, run on Liger's kernels; in place.

    Modules, parameters and their names stay as they are; nothing outside of this model changes.

    Returns:
        Kinds of norms and feed-forward blocks that Liger has no kernel for, which keep torch's operations.

    Raises:
        ConfigError: there is no kernel for any of them.
    """
    left, taken = set[str](), 0
    for module in model.modules():
        name = type(module).__name__
        forward = _forward_of(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            taken += 1
        elif name.endswith("MLP") and _family_of(module):
            left.add(f"{name} with {_activation(module)}")
        elif name.endswith(("Norm", "MLP")):
            left.add(name)
    if not taken:
        raise ConfigError(
            f"training.kernels = 'liger': Liger has no kernel for any block of this model "
            f"({', '.join(sorted(left)) or type(model).__name__}); leave it at 'torch'."
        )
    return sorted(left)


def _family_of(module: nn.Module) -> _Norm | None:
    """The row of `_FAMILIES` of one of Transformers' norms or feed-forward blocks."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return None
    return _FAMILIES.get(kind.__name__.removesuffix("RMSNorm").removesuffix("MLP"))


def _forward_of(module: nn.Module) -> Any:
    """The function that computes a module with Liger, or None."""
    if _family_of(module) is None:
        return None
    if type(module).__name__.endswith("RMSNorm"):
        return _norm
    return {**dict.fromkeys(_SILU, _swiglu), **dict.fromkeys(_GELU_TANH, _geglu)}.get(_activation(module))


def _activation(module: Any) -> str:
    return str(getattr(module.config, "hidden_activation", None) or module.config.hidden_act)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    family = _family_of(self)
    assert family is not None
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon  # Gemma's name, and the others'
    # Not in place: its backward pass would write into a gradient that others may hold.
    return liger_rms_norm(hidden_states, self.weight, eps, family.offset, family.casting, False)


def _swiglu(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


def _geglu(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_geglu

    return self.down_proj(liger_geglu(self.gate_proj(x), self.up_proj(x)))
