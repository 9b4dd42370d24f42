"""The loss of each token of a text."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
        logits = model.lm_head(hidden[start : start + len(targets)]).float()
        chunk = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss[start + 1 : start + 1 + len(targets)] = chunk.cpu().numpy()
    return loss
