"""`training.gradient_checkpointing`: activations that the backward pass works out again instead of keeping them.

Everything between the inputs of two layers is recomputed, a forward pass more. "selective" recomputes cheap operations
alone: norms, activation functions, rotations and conversions. It keeps the results of matrix products and attention,
which are about half of the memory and nearly all of the time.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_activations(model: Any, selective: bool = False) -> None:
    """Let the layers of a causal language model recompute their activations in the backward pass.

    Args:
        model: routed or stock.
        selective: keep the results of matrix products and attention.
    """
    arguments: dict[str, Any] = {"use_reentrant": False}
    if selective:
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # Named so from Transformers 5.20 or so on, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(arguments)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
