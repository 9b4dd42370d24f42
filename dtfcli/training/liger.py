"""`training.kernels`: who runs the element-wise work of the backbone's blocks while training.

"torch": Transformers' own operations, some ten for a norm. "liger": RMSNorm, SwiGLU and GEGLU as one Triton kernel
each, of the Liger library (`pip install 'dtfcli[liger]'`), on GPUs. Matrix products and attention have good kernels
without it, the language-model loss has its own here, and what routing adds is left alone.

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
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteMLP, GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP, Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP, SmolLM3RMSNorm

from dtfcli.errors import ConfigError


class _Norm(NamedTuple):
    """How a family writes its norm: what is added to w, and Liger's name for the types in between."""

    offset: float
    casting: str


_NORMS: dict[type[nn.Module], _Norm] = {
    **dict.fromkeys(
        (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm, SmolLM3RMSNorm, GraniteRMSNorm), _Norm(0.0, "llama")
    ),
    Olmo2RMSNorm: _Norm(0.0, "gemma"),
    Gemma3RMSNorm: _Norm(1.0, "gemma"),
}
_FEED_FORWARD = (LlamaMLP, Qwen2MLP, Qwen3MLP, MistralMLP, SmolLM3MLP, GraniteMLP, Olmo2MLP, Gemma3MLP)
_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""Liger's GEGLU has the approximation by tanh; these three are ways to write it."""


def check_liger(kernels: str, device: torch.device) -> None:
    """Refuse kernels that cannot run here.

    Raises:
        ConfigError: Liger is not installed, or the device is none that it runs on.
    """
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
        forward = _forward_of(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            taken += 1
        elif isinstance(module, _FEED_FORWARD):
            left.add(f"{type(module).__name__} with {_activation(module)}")
        elif type(module).__name__.endswith(("Norm", "MLP")):
            left.add(type(module).__name__)
    if not taken:
        raise ConfigError(
            f"training.kernels = 'liger': Liger has no kernel for any block of this model "
            f"({', '.join(sorted(left)) or type(model).__name__}); leave it at 'torch'."
        )
    return sorted(left)


def _forward_of(module: nn.Module) -> Any:
    """What computes a module with Liger; None: nothing does."""
    if type(module) in _NORMS:
        return _norm
    if isinstance(module, _FEED_FORWARD):
        return {**dict.fromkeys(_SILU, _swiglu), **dict.fromkeys(_GELU_TANH, _geglu)}.get(_activation(module))
    return None


def _activation(module: Any) -> str:
    config = module.config
    return str(config.hidden_activation if isinstance(module, Gemma3MLP) else config.hidden_act)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    kind = _NORMS[type(self)]
    eps = self.eps if isinstance(self, Gemma3RMSNorm) else self.variance_epsilon
    # Not in place: its backward pass would write into a gradient that others may hold.
    return liger_rms_norm(hidden_states, self.weight, eps, kind.offset, kind.casting, False)


def _swiglu(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


def _geglu(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_geglu

    return self.down_proj(liger_geglu(self.gate_proj(x), self.up_proj(x)))
