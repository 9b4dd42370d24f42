"""What every router has: thresholds of causal routing, and the questions that a layer, training and fitting ask it.

A router chooses the tokens of one routed layer. Its subclasses stand in a file for each way of choosing (`surprise`,
`cost`, `mod`, `layerdrop`), with their score, their loss and their fit; `routers` names them. Whatever is new has
`router`, `prior`, `forecast` or `predictor` in its parameter names.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .context import RoutingContext
from .outputs import RoutingRecord
from .routing import Scores, masked_mean

CAPACITY_GRID = (0.0, 0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375, 1.0)
"""γ for which calibration measures thresholds; others are interpolated."""


_MOMENTUM = 0.9
"""Of the moving averages over training steps: they span about ten."""


def move_average(average: Tensor, batch: Tensor) -> None:
    """Move an average, in place, toward this batch's value; a first value sets it."""
    average.copy_(torch.where(average.isnan(), batch, torch.lerp(batch, average, _MOMENTUM)))


class Router(nn.Module):
    """The router of one routed layer; always float32, whatever the model's dtype.

    Calibrated thresholds lie close together: bfloat16 would merge them.

    Attributes:
        thresholds: float32 [1 + len(CAPACITY_GRID)], of the scores: at the model's own γ (tracked while training, too),
            then on the grid.
        predictor_thresholds: the same for the predictor's logits, if there is a predictor.
    """

    by_token = True
    """Whether it chooses among the tokens of a layer; else it takes all or none, and needs no thresholds."""

    thresholds: Tensor
    predictor_thresholds: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.tables = ["thresholds", "predictor_thresholds"][: 1 + config.has_predictor] if self.by_token else []
        for name in self.tables:
            self.register_buffer(name, torch.empty(1 + len(CAPACITY_GRID), dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Forget all thresholds; the predictor's own starts at σ(p) = 0.5."""
        for name in self.tables:
            getattr(self, name).fill_(torch.nan)
        if "predictor_thresholds" in self.tables:
            self.set_threshold("predictor", None, 0.0)

    def prepare(self, context: RoutingContext) -> None:
        """Compute once, before the first layer of a pass, what all routed layers share; into `context.shared`."""

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: RoutingContext, store: Any) -> Scores:
        """The score and the gate of each token.

        Args:
            hidden_states: [B, T, D], before the routed part.
            below: what the decision layer below observed, float32 [B, T] each; () without one.
            context: of this pass.
            store: the layer's part of the cache, or None.
        """
        raise NotImplementedError

    def cost(self, update: Tensor, guess: Tensor | None) -> Tensor | None:
        """What a token loses by skipping, which the score has to predict: float32 [...]; None: it predicts nothing.

        Args:
            update: Δ, float32 [..., D].
            guess: its forecast f, [..., D]; None: there is none.
        """
        return None

    def loss(self, record: RoutingRecord, is_token: Tensor | None) -> list[Tensor]:
        """The weighted terms that this router adds to the loss, 0-d each; none, unless it learns otherwise."""
        return []

    def fit(self, hidden_states: Tensor, update: Tensor, guess: Tensor | None, weight: Tensor) -> None:
        """Fit the score to known updates, by least squares; nothing, unless it predicts what skipping loses.

        Args:
            hidden_states, update: x and Δ(x), float32 [N, D].
            guess: f(x), likewise, or None.
            weight: float32 [N], 0 for tokens that do not count.
        """

    def tracked(self) -> list[Tensor]:
        """What `track` moves, float32 [1] each: several processes take the mean of theirs."""
        return [self.threshold] if self.by_token else []

    def track(self, record: RoutingRecord, threshold: Tensor) -> None:
        """Move what is tracked while training toward this batch's; `threshold` is the batch's own, 0-d."""
        if self.by_token:
            move_average(self.threshold, threshold)

    def scalars(self) -> dict[str, float]:
        """Learned numbers for reports, by name; most routers have none."""
        return {}

    def table(self, mode: str) -> Tensor:
        """The thresholds of a causal mode: at the model's own γ, then on the grid."""
        return self.predictor_thresholds if mode == "predictor" else self.thresholds

    @property
    def threshold(self) -> Tensor:
        """The threshold at the model's own γ, float32 [1]; a view."""
        return self.thresholds[:1]

    def set_threshold(self, mode: str, capacity: float | None, value: Tensor | float) -> None:
        """Keep the threshold at a γ of the grid; None: at the model's own γ."""
        self.table(mode)[0 if capacity is None else 1 + CAPACITY_GRID.index(capacity)] = value

    def threshold_at(self, mode: str, capacity: float, own_capacity: float) -> Tensor:
        """The threshold at γ, float32 0-d, interpolated on the grid; NaN where nothing was calibrated.

        Args:
            mode: "threshold" or "predictor".
            capacity: γ of the pass.
            own_capacity: γ of the model itself.
        """
        table = self.table(mode)
        if capacity >= 1.0:
            return table.new_full((), -torch.inf)
        if capacity == own_capacity:
            return table[0]
        grid = table[1:]
        if capacity in CAPACITY_GRID:
            return grid[CAPACITY_GRID.index(capacity)]
        above = next(i for i, share in enumerate(CAPACITY_GRID) if share >= capacity)
        low, high = CAPACITY_GRID[above - 1], CAPACITY_GRID[above]
        return torch.lerp(grid[above - 1], grid[above], (capacity - low) / (high - low))

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor.is_meta:
                return moved.float() if moved.is_floating_point() else moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(keep_float32, recurse)


class TopKPredictor(nn.Module):
    """Predicts from a token alone whether top-K would take it (Mixture-of-Depths, section 3.5): D → D/2 → 1.

    Learns from top-K's choices without any pull at the model: its input carries no gradient.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w_in = nn.Linear(config.hidden_size, config.hidden_size // 2, bias=False)
        self.w_out = nn.Linear(config.hidden_size // 2, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] → logits p, float32 [B, T]; a token is routed when σ(p) > 0.5, that is p > 0."""
        return self.w_out(nn.functional.silu(self.w_in(hidden_states.detach()))).squeeze(-1).float()


def selection_loss(logits: Tensor, selected: Tensor, is_token: Tensor | None) -> Tensor:
    """Cross-entropy of scores or a predictor's logits against who entered, [B, T] each → 0-d."""
    return masked_mean(binary_cross_entropy_with_logits(logits, selected.float(), reduction="none"), is_token)
