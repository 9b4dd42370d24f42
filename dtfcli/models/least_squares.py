"""Weighted least squares, float32, some tokens at a time: inputs and targets may be of any precision."""

from typing import cast

import torch
from torch import Tensor

TINY = 1e-9
"""Keeps a division or a logarithm finite."""
RIDGE = 1e-2
"""Usually added to the diagonal of the normal equations, as a share of its mean."""
CHUNK = 8192
"""Tokens that are in float32, or go through an MLP, together: its inner activations are many times its output."""


class Normal:
    """The normal equations of a weighted least-squares problem: Σ_t a_t x_t x_tᵀ and what solves them.

    Args:
        x: [N, D].
        weight: a, float32 [N].
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.share = x, (weight / weight.sum().clamp(min=TINY)).unsqueeze(1)
        self.moments = self._product(x)

    def _product(self, targets: Tensor) -> Tensor:
        """Σ_t a_t x_t target_tᵀ, the weights' sum being 1; [N, E] → [D, E]."""
        parts = zip(*(each.split(CHUNK) for each in (self.x, self.share, targets)), strict=True)
        return cast("Tensor", sum((x.float() * share).t() @ y.float() for x, share, y in parts))

    def solve(self, targets: Tensor, ridge: float = RIDGE) -> Tensor:
        """The matrix C with the smallest Σ_t a_t ‖target_t − xᵀ_t C‖² and a slight ridge; [N, E] → [D, E]."""
        return torch.linalg.solve(self.ridged(ridge), self._product(targets))

    def ridged(self, ridge: float) -> Tensor:
        """The moments with a share of their mean diagonal added to it."""
        size = ridge * self.moments.diagonal().mean() + TINY
        return self.moments + size * torch.eye(len(self.moments), device=self.moments.device)
