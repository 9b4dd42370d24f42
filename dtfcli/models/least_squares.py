"""Weighted least squares, float32."""

import torch
from torch import Tensor

TINY = 1e-9
"""Keeps a division or a logarithm finite."""


class Normal:
    """The normal equations of a weighted least-squares problem: Σ_t a_t x_t x_tᵀ and what solves them.

    Args:
        x: float32 [N, D].
        weight: a, float32 [N].
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.weighted = x * (weight / weight.sum().clamp(min=TINY)).unsqueeze(1)
        self.moments = self.weighted.t() @ x

    def solve(self, targets: Tensor, ridge: float) -> Tensor:
        """The matrix C with the smallest Σ_t a_t ‖target_t − xᵀ_t C‖² and a slight ridge; [N, E] → [D, E]."""
        return torch.linalg.solve(self.ridged(ridge), self.weighted.t() @ targets)

    def ridged(self, ridge: float) -> Tensor:
        """The moments with a share of their mean diagonal added to it."""
        size = ridge * self.moments.diagonal().mean() + TINY
        return self.moments + size * torch.eye(len(self.moments), device=self.moments.device)
