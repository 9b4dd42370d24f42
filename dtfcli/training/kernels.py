"""`training.kernels`: who runs the element-wise work of the backbone's blocks while training.

"torch": Transformers' own operations, some ten for a norm. "liger": RMSNorm and SwiGLU as one Triton kernel each, of
the Liger library (`pip install 'dtfcli[liger]'`), on GPUs. Matrix products and attention have good kernels without it,
the language-model loss has its own here, and what routing adds is left alone.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from dtfcli.errors import ConfigError


def check_kernels(kernels: str, device: torch.device) -> None:
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


def use_liger(model: nn.Module) -> None:
    """Let the norms and feed-forward blocks of a model, routed or stock, run on Liger's kernels; in place.

    Modules, parameters and their names stay as they are; nothing outside of this model changes.
    """
    for module in model.modules():
        if isinstance(module, (LlamaRMSNorm, Qwen2RMSNorm)):
            module.forward = MethodType(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, (LlamaMLP, Qwen2MLP)) and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_feed_forward, module)  # type: ignore[method-assign]


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: its backward pass would write into a gradient that others may hold.
    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))
