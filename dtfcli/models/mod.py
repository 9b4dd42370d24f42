"""Mixture-of-Depths (arXiv 2404.02258): a linear score that follows the language model's gradient; and its control."""

from typing import Any

import torch
from torch import Tensor, nn

from .context import RoutingContext
from .outputs import RoutingRecord
from .router import Router, selection_loss
from .routing import Scores, masked_mean


def mod_scores(hidden_states: Tensor, weight: Tensor, kind: str = "sigmoid") -> Scores:
    """R = x · w, a linear score of the token alone; gate σ(r), or r itself ("raw").

    Args:
        hidden_states: [B, T, D].
        weight: float32 [D].
        kind: of gate, "sigmoid" or "raw".
    """
    score = hidden_states.float() @ weight
    return Scores(score, score if kind == "raw" else torch.sigmoid(score))


class LinearRouter(Router):
    """A linear score of the token; subclasses make its weight, float32 [D]."""

    weight: Tensor

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.normal_(0.0, self.config.initializer_range)

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any) -> Scores:
        return mod_scores(hidden_states, self.weight, self.config.mod_gate)


class ModRouter(LinearRouter):
    """MoD: the weight learns through the gate, and from auxiliary losses if they have a weight."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))

    def loss(self, record: RoutingRecord, is_token: Tensor | None) -> list[Tensor]:
        """The score against its own top-K mask (cross-entropy), and for its size (mean r²)."""
        aux, z = self.config.router_aux_loss_weight, self.config.router_z_loss_weight
        terms = []
        if aux:
            terms.append(aux * selection_loss(record.scores, record.selected, is_token))
        if z:
            terms.append(z * masked_mean(record.scores.square(), is_token))
        return terms


class RandomRouter(LinearRouter):
    """The control: MoD's score with a weight that stays as it was drawn."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("weight", torch.empty(config.hidden_size, dtype=torch.float32))
