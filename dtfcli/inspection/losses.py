"""Losses of the same texts under different conditions: each token's, and paired differences with their errors."""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class PairedLosses:
    """Losses of the same texts under several conditions.

    Attributes:
        nats: by condition, float64 [texts], summed over each text's targets.
        targets: int64 [texts].
    """

    nats: Mapping[str, NDArray[np.float64]]
    targets: NDArray[np.int64]

    def __add__(self, other: "PairedLosses") -> "PairedLosses":
        return PairedLosses(
            {name: np.append(own, other.nats[name]) for name, own in self.nats.items()},
            np.append(self.targets, other.targets),
        )

    def mean(self, name: str) -> float:
        """Nats per target under a condition."""
        return float(self.nats[name].sum() / max(1, self.targets.sum()))

    def difference(self, name: str, control: str) -> tuple[float, float | None]:
        """Mean under a condition minus that under another, and its standard error over texts (None for one text).

        The error is that of a ratio of sums, by linearization: Σ(d − r·n)² of the texts' differences d and targets n.
        """
        difference, count = self.nats[name] - self.nats[control], len(self.targets)
        ratio = float(difference.sum() / max(1, self.targets.sum()))
        if count < 2:
            return ratio, None
        residual = difference - ratio * self.targets
        return ratio, float(np.sqrt(count / (count - 1) * (residual**2).sum()) / self.targets.sum())
