"""What chooses the tokens of a routed layer, and what one pass tells all of them.

Whatever is new has `prior`, `router` or `predictor` in its parameter names. Scores say how much a token wants to
enter a layer; thresholds, one table for each causal mode, say how much is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from typing import Any

import torch
from torch import Tensor, nn

from .routing import Scores, mean_square, mod_scores, sink_mask
from .surprise import Recent, Scalars, dtf_scores, moving_average, recent_tokens

CAPACITY_GRID = (0.0, 0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375, 1.0)
"""γ for which calibration measures thresholds; others are interpolated."""

THRESHOLD_COLUMNS = 1 + len(CAPACITY_GRID)
"""Column 0 is the threshold at the model's own capacity (also tracked while training), then the grid."""


@dataclass(frozen=True)
class RoutingFrame:
    """What all routed layers of one forward pass share.

    Attributes:
        config: of the model; whatever does not change from pass to pass.
        mode: "topk", "threshold" or "predictor".
        shape: B and T.
        device: of the tokens.
        capacities: γ of each routed layer in this pass, by layer index.
        seen: bool [B, S + T], False for padding, over the S cached positions and the T new ones; None: no padding.
        past: S.
        column: the threshold column to use instead of the capacity's (calibration).
        thresholds: of each routed layer, where they must not be the router's own; None: they are.
        chosen: who enters, bool [B, T], in layers whose router is not to choose (as many of each row in `topk`).
        slots_per_row: of each routed layer, by its index, where nobody looks at how many tokens enter; None: layers do.
        noise: uniform numbers [B, T] that draw the tokens to explore; None: none are.
        shows_updates: whether layers hand out what each token is before and after their routed part.
        triton_kernels: whether linear maps of a layer that no row enters read no weights (`static`).
    """

    config: Any
    mode: str
    shape: tuple[int, int]
    device: torch.device
    capacities: Mapping[int, float]
    seen: Tensor | None = None
    past: int = 0
    column: int | None = None
    thresholds: Mapping[int, Tensor] | None = None
    chosen: Mapping[int, Tensor] | None = None
    slots_per_row: Mapping[int, int] | None = None
    noise: Tensor | None = None
    shows_updates: bool = False
    triton_kernels: bool = False

    @cached_property
    def real(self) -> Tensor | None:
        """Which of the new tokens are not padding, bool [B, T]; None: all."""
        return None if self.seen is None else self.seen[:, self.past :]

    @cached_property
    def seen_sinks(self) -> Tensor | None:
        """Which of all tokens are sinks, bool [B, S + T]; None: there are none."""
        return sink_mask(self.seen, self.config.sink_tokens, (self.shape[0], self.past + self.shape[1]), self.device)

    @cached_property
    def sinks(self) -> Tensor | None:
        """Which of the new tokens are sinks, bool [B, T]; None: there are none."""
        if self.seen is None and self.past >= self.config.sink_tokens:
            return None
        return None if self.seen_sinks is None else self.seen_sinks[:, self.past :]

    @cached_property
    def recent(self) -> Recent | slice:
        """The tokens that the moving average of each new token covers: no padding, and no sinks where it skips them."""
        (rows, tokens), window, counted = self.shape, self.config.ma_window, self.seen
        if counted is None:
            skipped = self.config.sink_tokens if self.config.skips_sinks_in_average else 0
            if tokens == 1 and self.past >= skipped:  # decoding: a run of positions
                return slice(max(skipped, self.past + 1 - window), self.past + 1)
            counted = torch.ones(rows, self.past + tokens, dtype=torch.bool, device=self.device)
        if self.config.skips_sinks_in_average and self.seen_sinks is not None:
            counted = counted & ~self.seen_sinks
        return recent_tokens(counted, window, self.past)

    def prepare(self) -> None:
        """Compute now what layers will ask for: compiled ones cannot enter `cached_property`'s lock (Python 3.11)."""
        _ = self.real, self.sinks
        if self.config.by_surprise:
            _ = self.recent


@dataclass(frozen=True)
class TokenFrame(RoutingFrame):
    """The frame of a token of each row on top of a static cache: what it says has the same shapes every time.

    Attributes:
        filled: bool [B, N], which of the cache's positions hold a token that may be attended to, the new ones included.
        position: int64 [1], the position of the new ones.
    """

    filled: Tensor | None = None
    position: Tensor | None = None

    def visible(self, window: int | None) -> Tensor:
        """Which of the cache's positions the new tokens attend to, bool [B, 1, 1, N]."""
        assert self.filled is not None, "a frame of this kind is made with it"
        assert self.position is not None, "and with this"
        if window is None:
            return self.filled[:, None, None]
        positions = torch.arange(self.filled.shape[1], device=self.device)
        return (self.filled & (positions > self.position - window))[:, None, None]

    @cached_property
    def real(self) -> None:
        """All: a row whose text has ended goes on with tokens that nobody reads."""
        return

    @cached_property
    def sinks(self) -> Tensor | None:
        """Whether the new token is a sink, bool [B, 1]; None: there are none."""
        assert self.filled is not None, "a frame of this kind is made with it"
        count = self.config.sink_tokens
        return self.filled.sum(1, keepdim=True) <= count if count else None


class Predictor(nn.Module):
    """Guesses from a token alone whether top-K would take it (Mixture-of-Depths, section 3.5): D → D/2 → 1.

    Learns from top-K's choices without pulling at the model: its input carries no gradient.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w_in = nn.Linear(config.hidden_size, config.hidden_size // 2, bias=False)
        self.w_out = nn.Linear(config.hidden_size // 2, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] → logits p, float32 [B, T]; a token is routed when σ(p) > 0.5, that is p > 0."""
        return self.w_out(nn.functional.silu(self.w_in(hidden_states.detach()))).squeeze(-1).float()


class Router(nn.Module):
    """Thresholds of one routed layer, common to all architectures; always float32, whatever the model's dtype.

    Calibrated thresholds lie close together: bfloat16 would merge them.

    Attributes:
        thresholds: of the scores, for the layer's own γ and the grid.
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
            self.register_buffer(name, torch.empty(THRESHOLD_COLUMNS, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Forget all thresholds; the predictor's own starts at σ(p) = 0.5."""
        for name in self.tables:
            getattr(self, name).fill_(torch.nan)
        if "predictor_thresholds" in self.tables:
            self.predictor_thresholds[0] = 0.0

    def scalars(self) -> dict[str, float]:
        """Learned numbers for reports, by name; most routers have none."""
        return {}

    @property
    def capacity(self) -> float:
        """γ of the model itself; the γ of a pass is in its frame."""
        return self.config.layer_capacity(self.layer_idx)

    def table(self, mode: str) -> Tensor:
        """The thresholds of a causal mode, float32 [THRESHOLD_COLUMNS]."""
        return self.predictor_thresholds if mode == "predictor" else self.thresholds

    def threshold(self, mode: str, capacity: float | None = None, column: int | None = None) -> Tensor:
        """The threshold at γ (None: the layer's own), float32 0-d; NaN where nothing was calibrated."""
        table = self.table(mode)
        if column is not None:
            return table[column]
        if (self.capacity if capacity is None else capacity) >= 1.0:
            return table.new_full((), -torch.inf)
        if capacity is None or capacity == self.capacity:
            return table[0]
        if capacity in CAPACITY_GRID:
            return table[1 + CAPACITY_GRID.index(capacity)]
        above = next(i for i, share in enumerate(CAPACITY_GRID) if share >= capacity)
        low, high = CAPACITY_GRID[above - 1], CAPACITY_GRID[above]
        return torch.lerp(table[above], table[above + 1], (capacity - low) / (high - low))

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor.is_meta:
                return moved.float() if moved.is_floating_point() else moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(keep_float32, recurse)


class PredictiveRouter(Router):
    """DTF: gates by expected and unexpected change (3.8–3.12), with four learnable scalars.

    o_ce and m_cu are stored as logarithms: they must stay positive (ln of a negative o_ce is a NaN).
    """

    log_o_ce: nn.Parameter
    log_m_cu: nn.Parameter
    beta_ce: nn.Parameter
    beta_cu: nn.Parameter

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.initial = {
            "log_o_ce": log(config.o_ce_init),
            "log_m_cu": log(config.m_cu_init),
            "beta_ce": config.beta_ce_init,
            "beta_cu": config.beta_cu_init,
        }
        for name in self.initial:
            self.register_parameter(name, nn.Parameter(torch.empty(1, dtype=torch.float32)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in self.initial.items():
            getattr(self, name).fill_(value)

    def forward(self, static: Tensor, change: Tensor, history: Tensor, frame: RoutingFrame) -> Scores:
        """D_st, D_ch of the new tokens: float32 [B, T]; D_st of the row up to them: float32 [B, S + T]."""
        of = Scalars(self.log_o_ce.exp(), self.log_m_cu.exp(), self.beta_ce, self.beta_cu)
        average = moving_average(history, frame.recent)
        return dtf_scores(static, change, average, of, self.config.surprise_scale)

    def scalars(self) -> dict[str, float]:
        """The four scalars of the paper, for reports."""
        return {
            "o_ce": exp(self.log_o_ce.item()),
            "m_cu": exp(self.log_m_cu.item()),
            "beta_ce": self.beta_ce.item(),
            "beta_cu": self.beta_cu.item(),
        }


class LinearRouter(Router):
    """MoD: a linear score of the token's hidden state."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_kind = config.mod_gate
        self.std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.normal_(0.0, self.std)

    def forward(self, hidden_states: Tensor) -> Scores:
        """[B, T, D] → scores [B, T]."""
        return mod_scores(hidden_states, self.weight, self.gate_kind)


class CostRouter(Router):
    """DTF by a learned estimate of what skipping costs: ŝ = w · n + v · silu(U n), n = x / RMS(x); the gate is 1.

    A regression of ln(‖Δ‖² / D), Δ being the update that is skipped, or with a forecast f of ln(‖Δ − f‖² / D), up to a
    constant of the layer. Linear unless `score_factor` gives it hidden units.

    Attributes:
        level: that constant, float32 [1], as training sees it: predicted cost = score + level.
    """

    level: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, hidden = config.hidden_size, round(config.hidden_size * config.score_factor)
        self.std, self.eps = config.initializer_range, config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.w_in = nn.Parameter(torch.empty(hidden, size, dtype=torch.float32)) if hidden else None
        self.w_out = nn.Parameter(torch.empty(hidden, dtype=torch.float32)) if hidden else None
        self.register_buffer("level", torch.empty(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.level.fill_(torch.nan)
        self.weight.normal_(0.0, self.std)
        if self.w_in is not None and self.w_out is not None:
            self.w_in.normal_(0.0, self.std)
            self.w_out.zero_()

    def forward(self, hidden_states: Tensor) -> Scores:
        """[B, T, D] → scores [B, T]."""
        x = hidden_states.detach().float()
        scale = torch.rsqrt(mean_square(x, keepdim=True) + self.eps)  # behind the matrices, as in PriorFFN
        score = (x @ self.weight) * scale.squeeze(-1)
        if self.w_in is not None and self.w_out is not None:
            score = score + nn.functional.silu((x @ self.w_in.t()) * scale) @ self.w_out
        return Scores(score, torch.ones_like(score))

    def scalars(self) -> dict[str, float]:
        return {"level": self.level.item()}


class RandomRouter(Router):
    """The control of MoD: its linear score with a weight that stays as it was drawn."""

    weight: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_kind = config.mod_gate
        self.std = config.initializer_range
        self.register_buffer("weight", torch.empty(config.hidden_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.normal_(0.0, self.std)

    def forward(self, hidden_states: Tensor) -> Scores:
        """[B, T, D] → scores [B, T]."""
        return mod_scores(hidden_states, self.weight, self.gate_kind)


class LayerSwitch(Router):
    """layerdrop: every token scores 0; a kept layer's threshold lies below that, another's above."""

    by_token = False

    def forward(self, hidden_states: Tensor) -> Scores:
        """[B, T, D] → scores [B, T]."""
        zero = torch.zeros(hidden_states.shape[:2], dtype=torch.float32, device=hidden_states.device)
        return Scores(zero, zero + 1.0)

    def threshold(self, mode: str, capacity: float | None = None, column: int | None = None) -> Tensor:
        """−1 for a layer that is kept, 1 for one that is left out, on the CPU: the same for every mode."""
        return torch.tensor(-1.0 if (self.capacity if capacity is None else capacity) else 1.0)


ROUTERS: dict[str, type[Router]] = {
    "dtf": PredictiveRouter,
    "mod": LinearRouter,
    "random": RandomRouter,
    "layerdrop": LayerSwitch,
}
"""By architecture."""


def router_of(config: Any, layer_idx: int) -> Router:
    """The router of a layer: by architecture, and for DTF by what its score is."""
    if config.predicts_cost:
        return CostRouter(config, layer_idx)
    return ROUTERS[config.architecture](config, layer_idx)
