"""Savings and capacities: which γ leaves out which share of a forward pass's FLOPs."""

import math
from typing import Any

from dtfcli.conversion.text import LENGTH
from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.models import savings
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM

SAVINGS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.30, 0.40)
"""Of the dial in a report."""
LEAST = 1 / 32
"""The smallest γ of the dial: of the grid of thresholds."""


def saved_share(model: Any, capacity: float) -> float:
    """Share of a forward pass's FLOPs that a routed model leaves out at γ; of blocks, for rows of `LENGTH`."""
    if isinstance(model, RoutedCausalLM):
        return savings.saved_share(model, capacity)
    shares = model.config.layer_capacities(capacity)
    routed = forward_flops_per_token(model, LENGTH, shares=shares)
    return 1.0 - routed / forward_flops_per_token(model, LENGTH, dense=True)


def capacity_for(model: Any, saving: float) -> float | None:
    """The largest γ of four digits that saves so much; None: out of reach."""
    low, high = LEAST, 1.0
    if saving == 0.0 or saved_share(model, low) < saving:
        return None if saving else 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if saved_share(model, middle) >= saving else (low, middle)
    return math.floor(low * 1e4) / 1e4
