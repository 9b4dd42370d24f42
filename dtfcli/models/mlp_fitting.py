"""Fits routed MLPs to text: forecasts, scores and thresholds, by least squares in one forward pass.

Each MLP sees all tokens of the text at once, fits itself, and hands on what it will hand on in use; so layers above are
fitted to what they will see. Of all tokens a few vectors are held, in the precision of the computation; what takes more
goes over `CHUNK` of them at a time. Shape suffixes as in `modeling_routed_mlp`. Everything is float32.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .least_squares import CHUNK, TINY, Normal
from .mlp_survey import (
    Effect,
    Text,
    compute,
    kept_tokens,
    measure_effects,
    pass_together,
    survey,
    token_costs,
)
from .modeling_routed_mlp import GRID, MLPForecast, RoutedMLP, interpolated, like_bfloat16, quantile, routed_mlps

_PULL = 0.05
"""`RIDGE` of a cluster's own map."""
_FIRST = 20.0
"""Weight of first tokens in the score's fit. They carry massive activations, and have to enter."""
_CORRECTED = 2048
"""Tokens by which thresholds of γ that are not the model's own are corrected after a fit."""
CALIBRATED = (0.75, 0.5, 0.25)
"""γ besides the model's own at which thresholds are corrected."""


def fit_routing(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    on_layer: Callable[[int, int], None] | None = None,
    *,
    forecasts: bool = True,
) -> None:
    """Fit forecasts, scores and thresholds of a model with routed MLPs to some text.

    A survey of a few thousand tokens chooses neurons, and shares γ among layers; one forward pass over all does the
    rest.

    Args:
        model: any model with routed MLPs. The fit uses its γ: a layer sees tokens that skipped below.
        batches: as in `Text.of`.
        on_layer: called with the number of MLPs that are fitted, and with the number of all.
        forecasts: False keeps forecasts, neurons, and how layers share γ: scores and thresholds alone are fitted.

    Raises:
        ValueError: no batches; activations are no finite numbers (names the layer).
    """
    text, mlps = Text.of(batches), routed_mlps(model)
    effects = measure_effects(model, text)
    rough = survey(model, text, effects) if forecasts else {}

    def fit(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        y = fit_mlp(mlp, x, (counted, first), effects[mlp.layer_idx], rough.get(mlp.layer_idx))
        if on_layer is not None:
            on_layer(list(mlps).index(mlp.layer_idx) + 1, len(mlps))
        return y

    pass_together(model, text, fit)
    _correct(model, text.some(_CORRECTED), CALIBRATED, by_own=True)


def calibrate(model: Any, batches: Iterable[Mapping[str, Tensor]], capacities: Iterable[float] | None = None) -> None:
    """Correct thresholds by what layers see where lower layers skip.

    One forward pass at the model's γ and at each of some others. Between them corrections are interpolated.

    Args:
        model: as in `fit_routing`, which fits it first where nothing has.
        batches: as in `Text.of`.
        capacities: γ besides the model's own; None: `CALIBRATED`.
    """
    text = Text.of(batches)
    if model.is_fitted:
        _correct(model, text, CALIBRATED if capacities is None else capacities)
    else:
        fit_routing(model, [{"input_ids": text.ids, "attention_mask": text.mask}])


def _correct(model: Any, text: "Text", capacities: Iterable[float], by_own: bool = False) -> None:
    """`calibrate`; `by_own`: the model's own γ has good thresholds, and says how unusual this text is."""
    shifts = {mlp: dict[float, float]() for mlp in routed_mlps(model).values()}
    own = {mlp: mlp.capacity for mlp in shifts}

    def correct(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        scores = mlp.router(flat := x.reshape(-1, x.shape[-1]))
        if mlp.capacity in (0.0, 1.0):
            return mlp.route(flat, mlp.enters(scores)).view_as(x)
        threshold = quantile(scores[counted.flatten()], interpolated(mlp.router.shares, mlp.capacity).item())
        shifts[mlp][mlp.capacity] = float(threshold - mlp.router.threshold(mlp.capacity))
        return mlp.route(flat, scores > threshold).view_as(x)

    for capacity in (None, *capacities):
        with model.routing_mode(capacity=capacity):
            pass_together(model, text, correct)
    for mlp, found in shifts.items():
        points = sorted((capacity, shift - by_own * found.get(own[mlp], 0.0)) for capacity, shift in found.items())
        if points:
            shift = [_between(points, place / GRID) for place in range(GRID + 1)]
            mlp.router.keep(mlp.router.thresholds.sum(0) + torch.tensor(shift, device=model.device))


def _between(points: list[tuple[float, float]], at: float) -> float:
    """The value at a place between points (place, value) in order; outside of them the nearest point's value."""
    low = max((point for point in points if point[0] <= at), default=points[0])
    high = min((point for point in points if point[0] >= at), default=points[-1])
    return low[1] if low[0] == high[0] else low[1] + (high[1] - low[1]) * (at - low[0]) / (high[0] - low[0])


@torch.no_grad()
def fit_mlp(mlp: RoutedMLP, x: Tensor, which: tuple[Tensor, Tensor], effect: Effect, rough: Tensor | None) -> Tensor:
    """Fit forecast, score and thresholds of one MLP to text; returns what it hands on, [B, T, D].

        W = argmin Σ_t a_t ‖MLP(x̃_t) − MLP'(x̃_t) − W x̃_t‖²,   a_t = 1 / ‖MLP(x̃_t)‖²
        w = argmin Σ_t (c_t − w · x̃_t − mean)²,               c_t = ln(‖MLP(x̃_t) − f(x̃_t)‖² / D) + β v · x̃_t

    where tokens that enter by their rough score have little weight in the forecast f.

    Args:
        mlp: of a layer whose lower layers are fitted.
        x: x̃ of all tokens, [B, T, D].
        which: bool [B, T] each: the tokens that are no padding, and the first of each text.
        effect: of its errors; has v.
        rough: the survey's score, float32 [D]; None: the forecast stays.

    Raises:
        ValueError: activations are no finite numbers; names the layer.
    """
    tokens, counted, first = x.reshape(-1, x.shape[-1]), *(each.flatten() for each in which)
    computed, router, usual = compute(mlp, tokens), mlp.router, counted & ~first
    if rough is not None:
        with torch.autocast(x.device.type, enabled=False):
            scores = _each(lambda x: x.float() @ rough, tokens)
            enters = scores > scores[usual].quantile(1 - interpolated(router.shares, mlp.capacity).item())
            kept, weight = kept_tokens(usual / (_each(_mean_square, computed) + TINY), enters)
            fit_forecast(mlp.forecast, tokens[kept], computed[kept], weight)
    squares = _each(lambda x, y: _mean_square(y.float() - mlp.forecast(x).float()), tokens, computed)
    with torch.autocast(x.device.type, enabled=False):
        effects = _each(lambda x: x.float() @ effect.direction, tokens)
        cost = token_costs(squares, effects - effects[usual].mean())
        cost = torch.where(first, cost[usual].max(), cost)
        importance = usual + _FIRST * (first & counted)
        mean = (cost * importance).sum() / importance.sum()
        if not router.random:
            score = Normal(tokens, importance).solve((cost - mean).unsqueeze(1)).squeeze(1)
            router.weight.copy_(like_bfloat16(score))
            router.cost_offset.copy_(mean)
        scores = _each(router, tokens)
        router.measure(scores[counted])
    return mlp.route(tokens, mlp.enters(scores), computed).view_as(x)


def _each(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """A function of tokens, [N, D] each, some at a time."""
    return torch.cat([f(*some) for some in zip(*(each.split(CHUNK) for each in x), strict=True)])


def _mean_square(x: Tensor) -> Tensor:
    """‖x‖² / D, [N, D] → float32 [N]."""
    return x.float().square().mean(1)


def fit_forecast(forecast: MLPForecast, tokens: Tensor, computed: Tensor, weight: Tensor) -> None:
    """Fit W, and A B of each cluster, to what MLP' leaves of the MLP.

    Args:
        forecast: MLP' has its neurons.
        tokens, computed: x̃ and MLP(x̃), [M, D].
        weight: a, float32 [M].
    """
    narrow = forecast.narrow
    rest = computed if narrow is None else _each(lambda x, y: y.float() - narrow(x).float(), tokens, computed)
    common = Normal(tokens, weight).solve(rest)
    forecast.linear.weight.copy_(common.t())
    if forecast.maps == 1:
        return
    rest = _each(lambda x, y: y - x.float() @ common, tokens, rest)
    forecast.centers.copy_(_directions(tokens, forecast.maps))
    cluster = _each(forecast.cluster, tokens)
    for j in range(forecast.maps):
        of = (cluster == j).nonzero().squeeze(1)
        forecast.up[j], forecast.down[j] = _low_rank(tokens[of].float(), rest[of], weight[of], forecast.up.shape[-1])


def _low_rank(x: Tensor, targets: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [D, R] and B [R, D] with the smallest Σ_t weight_t ‖target_t − A B x_t‖² (reduced-rank regression)."""
    size = x.shape[1]
    if len(x) < rank:
        return x.new_zeros(size, rank), x.new_zeros(rank, size)
    normal = Normal(x, weight)
    root = torch.linalg.cholesky(normal.ridged(1e-3))
    left, values, right = torch.svd_lowrank(root.t() @ normal.solve(targets, _PULL), q=min(rank + 16, size), niter=4)
    half = torch.linalg.solve_triangular(root.t(), left[:, :rank] * values[:rank], upper=True)
    return right[:, :rank].contiguous(), half.t().contiguous()


def _directions(x: Tensor, count: int, rounds: int = 8) -> Tensor:
    """K-means of the directions x / ‖x‖: [N, D] → unit vectors [count, D]."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(x[torch.randperm(len(x), generator=generator)[:count].to(x.device)].float(), dim=1)
    for _ in range(rounds):
        sums = torch.zeros_like(centers)
        for chunk in x.split(CHUNK):
            unit = F.normalize(chunk.float(), dim=1)
            sums.index_add_(0, (unit @ centers.t()).argmax(1), unit)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
    return centers
