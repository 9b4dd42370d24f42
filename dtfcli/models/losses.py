"""Next-token cross-entropy that never holds the vocabulary logits of a whole batch.

Shapes: N tokens with a target, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

_CHUNK_ELEMENTS = 2**25
"""Logits held at once (float32, 128 MiB): large enough to keep a matrix product busy."""


class _LinearCrossEntropySum(torch.autograd.Function):
    """sum_n −log softmax(hidden_n · weightᵀ)[label_n], a few rows of logits at a time.

    The gradient of a cross-entropy is known as soon as its logits are (softmax − one-hot), so both gradients
    are formed in the forward pass and the logits are dropped: no recomputation, three matrix products in all.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        device_type = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_ND.dtype
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        weight = weight_VD.to(dtype)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        rows = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])
        with torch.autocast(device_type, enabled=False):
            for start in range(0, hidden_ND.shape[0], rows):
                chunk = slice(start, start + rows)
                hidden, labels = hidden_ND[chunk].to(dtype), labels_N[chunk]
                counted = labels != IGNORE_INDEX
                targets = labels.clamp(min=0).unsqueeze(1)
                logits = (hidden @ weight.t()).float()
                normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
                loss += ((normalizer - logits.gather(1, targets)).squeeze(1) * counted).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad_logits = logits.sub_(normalizer).exp_()
                grad_logits.scatter_add_(1, targets, torch.full_like(normalizer, -1.0))
                grad_logits = grad_logits.mul_(counted.unsqueeze(1)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad_logits @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def causal_lm_loss(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of each next token, in nats.

    Args:
        hidden_states: [B, T, D], the last hidden states; position t predicts label t + 1.
        weight: [V, D], the language-model head.
        labels: [B, T] int64, not shifted; -100 is ignored.
        num_items_in_batch: divide the sum by this number (targets in a whole update) instead of by the number of
            targets here.

    Returns:
        0-d float32 tensor.
    """
    hidden = hidden_states[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(hidden.device)
    total = _LinearCrossEntropySum.apply(hidden, weight, targets)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def reference_causal_lm_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, with whole logits: what `causal_lm_loss` is tested against."""
    logits = F.linear(hidden_states[:, :-1], weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
