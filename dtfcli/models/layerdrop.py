"""The control `layerdrop`: a routed layer is kept or left out whole, for every token."""

from typing import Any

import torch
from torch import Tensor

from .context import RoutingContext
from .router import Router
from .routing import Scores


class LayerdropRouter(Router):
    """Every token scores 0; the threshold of a layer that is kept lies below that, the other's above."""

    by_token = False

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any) -> Scores:
        zero = torch.zeros(hidden_states.shape[:2], dtype=torch.float32, device=hidden_states.device)
        return Scores(zero, zero + 1.0)

    def threshold_at(self, mode: str, capacity: float, own_capacity: float) -> Tensor:
        """−1 for a layer that is kept (γ 1), 1 for one that is left out (γ 0), on the CPU: the same in every mode."""
        return torch.tensor(-1.0 if capacity else 1.0)
