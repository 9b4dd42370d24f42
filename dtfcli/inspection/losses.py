"""The loss of each token of a text."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from dtfcli.models.modeling_routed_mlp import RoutedCausalLM

_LOGITS_AT_ONCE = 256
"""Positions whose logits are held together: a whole text's would take T · V floats."""


@torch.inference_mode()
def next_token_losses(model: Any, hidden: Tensor, ids: Tensor) -> NDArray[np.float64]:
    """−ln p of each token of a window under the tokens before it, nats.

    Args:
        model: a causal language model; its head is used.
        hidden: last hidden states, [T, D].
        ids: int64 [T].

    Returns:
        float64 [T]; NaN for the first token.
    """
    loss = np.full(len(ids), np.nan)
    for start in range(0, len(ids) - 1, _LOGITS_AT_ONCE):
        targets = ids[start + 1 : start + 1 + _LOGITS_AT_ONCE]
        logits = _logits(model, hidden[start : start + len(targets)]).float()
        chunk = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss[start + 1 : start + 1 + len(targets)] = chunk.cpu().numpy()
    return loss


def _logits(model: Any, states: Tensor) -> Tensor:
    """Logits of last hidden states, [T, D] → [T, V].

    A model with routed MLPs may be of any family, and some do more than multiply by the head: its own forward pass runs
    on a stack that returns these states.
    """
    if not isinstance(model, RoutedCausalLM):
        return model.lm_head(states)
    stack = model.get_decoder()
    stack.forward = lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[None])
    try:
        return model(input_ids=torch.zeros(1, len(states), dtype=torch.long, device=states.device)).logits[0]
    finally:
        del stack.forward
