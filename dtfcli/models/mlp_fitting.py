"""Fits routed MLPs to text: neurons, forecasts, scores and thresholds, by least squares in one forward pass.

Each MLP sees all tokens of the text at once, fits itself, and hands on what it will hand on in use; so layers above are
fitted to what they will see. Shape suffixes as in `modeling_routed_mlp`. Everything is float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modeling_routed_mlp import (
    GRID,
    MLPForecast,
    RoutedMLP,
    inner_linears,
    interpolated,
    like_bfloat16,
    quantile,
    routed_mlps,
)

_RIDGE, _PULL = 1e-2, 0.05
"""Added to the diagonals of normal equations, as shares of their means: of the common map, of a cluster's own."""
_ENTERING = 0.05
"""Weight, in the forecast's second fit, of tokens that enter: γ may be another one tomorrow."""
_FIRST = 20.0
"""Weight of first tokens in the score's fit. They carry massive activations, and have to enter."""
_SURVEYED = 4096
"""Tokens of the survey; at least two for each dimension."""
_TOGETHER = 1024
"""Tokens of the survey that go through the model together: their activations are kept for the backward pass."""
_CHUNK = 8192
"""Tokens that go through an MLP together: its inner activations are many times larger than its output."""
_TINY = 1e-9
CALIBRATED = (0.75, 0.5, 0.25)
"""γ besides the model's own at which thresholds are corrected."""
_NOT_FINITE = (
    "layer {}: its MLP gives numbers that are not finite on this text, so nothing can be fitted. "
    "Open the model in another dtype (float32 or bfloat16), or fit it to another text"
)


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
        batches: as in `RoutedCausalLM.pass_together`.
        on_layer: called with the number of MLPs that are fitted, and with the number of all.
        forecasts: False keeps forecasts, neurons, and how layers share γ: scores and thresholds alone are fitted.

    Raises:
        ValueError: no batches; activations are no finite numbers (names the layer).
    """
    batches, mlps = list(batches), routed_mlps(model)
    if not batches:
        raise ValueError("batches is empty: give it text, some thousand tokens of it")
    scores = survey(model, batches) if forecasts else {}

    def fit(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        y = fit_mlp(mlp, x, counted, first, scores.get(mlp.layer_idx))
        if on_layer is not None:
            on_layer(list(mlps).index(mlp.layer_idx) + 1, len(mlps))
        return y

    fitted, others = _parts(batches)
    model.pass_together(fitted, fit)
    calibrate(model, others)


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[Mapping[str, Tensor]], capacities: Iterable[float] | None = None) -> None:
    """Correct thresholds by what layers see where lower layers skip, on text that nothing was fitted to.

    One forward pass at the model's γ and at each of some others. Between them corrections are interpolated.

    Args:
        model: as in `fit_routing`, which fits it first where nothing has.
        batches: as in `RoutedCausalLM.pass_together`.
        capacities: γ besides the model's own; None: `CALIBRATED`.
    """
    batches, shifts = list(batches), dict[RoutedMLP, dict[float, float]]()
    if not model.is_fitted:
        return fit_routing(model, batches)

    def correct(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        scores = mlp.router(flat := x.reshape(-1, x.shape[-1]))
        if mlp.capacity in (0.0, 1.0):
            return mlp.route(flat, mlp.enters(scores)).view_as(x)
        threshold = quantile(scores[counted.flatten()], interpolated(mlp.router.shares, mlp.capacity).item())
        shifts.setdefault(mlp, {})[mlp.capacity] = float(threshold - mlp.router.threshold(mlp.capacity))
        return mlp.route(flat, scores > threshold).view_as(x)

    for capacity in (None, *(CALIBRATED if capacities is None else capacities)):
        with model.routing_mode(capacity=capacity):
            model.pass_together(batches, correct)
    for mlp, points in shifts.items():
        shift = [_between(sorted(points.items()), place / GRID) for place in range(GRID + 1)]
        mlp.router.keep(mlp.router.thresholds.sum(0) + torch.tensor(shift, device=model.device))


def _between(points: list[tuple[float, float]], at: float) -> float:
    """The value at a place between points (place, value) in order; outside of them the nearest point's value."""
    low = max((point for point in points if point[0] <= at), default=points[0])
    high = min((point for point in points if point[0] >= at), default=points[-1])
    return low[1] if low[0] == high[0] else low[1] + (high[1] - low[1]) * (at - low[0]) / (high[0] - low[0])


def _parts(batches: list[Mapping[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What is fitted to, and an eighth of the rows for thresholds; a single row serves both."""
    rows = [
        {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    count = len(rows) // 8
    return (rows[:-count], rows[-count:]) if count else (rows, rows)


# The survey


@torch.no_grad()
def survey(model: Any, batches: list[Mapping[str, Tensor]]) -> dict[int, Tensor]:
    """Choose neurons, share γ among layers, and score tokens roughly; returns rough scores by layer, float32 [D].

    Every token enters here. With g_t the gradient of the loss (of labels that the model draws itself) with respect to
    what the MLP of a layer returns, a forecast off by e_t raises the loss by about E[(g · e_t)²] / 2, an expectation
    over g. Its estimate, ln ‖e_t‖² + ln E‖g‖² and a constant, has one unit in all layers. One threshold for all of
    them together says which share of the tokens enters each: its γ at the model's γ.
    """
    mlps, rough, costs = routed_mlps(model), dict[int, Tensor](), dict[int, Tensor]()
    if not mlps:
        return rough
    seen = _dense_passes(model, batches)
    for layer, (x, y, g) in seen.items():
        weight = 1 / (y.square().mean(1) + _TINY)
        for last in (False, True):
            rest, narrow = y, mlps[layer].forecast.narrow
            if last and narrow is not None:
                choose_neurons(mlps[layer], x, weight)
                rest = y - narrow(x.to(mlps[layer].forecast.linear.weight.dtype)).float()
            rest = rest - x @ Normal(x, weight).solve(rest, _RIDGE)
            cost = (rest.square().mean(1) + _TINY).log()
            rough[layer] = Normal(x, torch.ones_like(cost)).solve((cost - cost.mean()).unsqueeze(1), _RIDGE).squeeze(1)
            if mlps[layer].router.random:
                rough[layer] = mlps[layer].router.weight
            scores = x @ rough[layer]
            enters = scores > scores.quantile(1 - mlps[layer].capacity)
            weight = weight * torch.where(enters, _ENTERING, 1.0)
        costs[layer] = scores + cost.mean() + (g + _TINY).log()
    if model.config.architecture == "dtf" and not isinstance(model.config.capacity, list):
        together = torch.cat(list(costs.values())).sort(descending=True).values
        for place in range(1, GRID):
            threshold = together[round(place / GRID * len(together))]
            for layer, cost in costs.items():
                mlps[layer].router.shares[place] = (cost > threshold).float().mean()
    return rough


def _dense_passes(model: Any, batches: list[Mapping[str, Tensor]]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Forward and backward passes over the survey's tokens, with every token in every MLP.

    Returns:
        By layer: x̃ and MLP(x̃) of the tokens that count, float32 [N, D], and E‖g‖², float32 0-d.
    """
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in routed_mlps(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for ids, mask in _surveyed(batches, model.config.hidden_size):
            _dense_pass(model, ids.to(model.device), mask.to(model.device), seen)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    joined = {layer: [torch.cat(parts) for parts in zip(*passes, strict=True)] for layer, passes in seen.items()}
    return {layer: (x, y, g.square().sum(1).mean()) for layer, (x, y, g) in joined.items()}


def _surveyed(batches: list[Mapping[str, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the text, evenly spread: token ids and masks, [B, T] each, of few tokens."""
    ids = torch.cat([batch["input_ids"] for batch in batches])
    mask = torch.cat([batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches])
    rows = min(len(ids), -(-max(_SURVEYED, 2 * size) // ids.shape[1]))
    chosen = torch.arange(rows) * len(ids) // rows
    for part in chosen.split(max(1, _TOGETHER // ids.shape[1])):
        yield ids[part], mask[part]


def _dense_pass(model: Any, ids: Tensor, mask: Tensor, seen: dict[int, list[tuple[Tensor, ...]]]) -> None:
    """One of the passes; appends x̃, MLP(x̃) and its gradient, float32 [N, D], to those `seen` of each layer."""
    usual = mask.bool() & (mask.cumsum(1) > 1)
    outputs: list[tuple[int, Tensor, Tensor]] = []

    def keep(mlp: RoutedMLP, x: Tensor) -> Tensor:
        outputs.append((mlp.layer_idx, x.detach()[usual].float(), mlp.compute(x)))
        return outputs[-1][2]

    with model.replaced(keep), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        logits = model(inputs_embeds=embedded, use_cache=False, **padded).logits[usual].float()
        generator = torch.Generator(logits.device).manual_seed(0)
        probabilities = logits.detach().softmax(-1).nan_to_num()
        labels = (probabilities + _TINY).multinomial(1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, _, y in outputs])
    for (layer, x, y), g in zip(outputs, gradients, strict=True):
        if not bool(y.isfinite().all()):
            raise ValueError(_NOT_FINITE.format(layer))
        seen[layer].append((x, y.detach()[usual].float(), g[usual].float()))


# The fit


@torch.no_grad()
def fit_mlp(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor, rough: Tensor | None) -> Tensor:
    """Fit forecast, score and thresholds of one MLP to text; returns what it hands on, [B, T, D].

        W = argmin Σ_t a_t ‖MLP(x̃_t) − MLP'(x̃_t) − W x̃_t‖²,   a_t = 1 / ‖MLP(x̃_t)‖²
        w = argmin Σ_t (c_t − w · x̃_t − mean)²,               c_t = ln(‖MLP(x̃_t) − f(x̃_t)‖² / D)

    where tokens that enter by their rough score have little weight in the forecast f.

    Args:
        mlp: of a layer whose lower layers are fitted.
        x: x̃ of all tokens, [B, T, D].
        counted: bool [B, T], which tokens are no padding.
        first: bool [B, T], the first token of each text.
        rough: the survey's score, float32 [D]; None: the forecast stays.

    Raises:
        ValueError: activations are no finite numbers; names the layer.
    """
    tokens, counted, first = x.reshape(-1, x.shape[-1]), counted.flatten(), first.flatten()
    computed = torch.cat([mlp.compute(chunk) for chunk in tokens.split(_CHUNK)])
    flat, forecast, rest = tokens.float(), mlp.forecast, computed.float()
    if not bool(rest.isfinite().all()):
        raise ValueError(_NOT_FINITE.format(mlp.layer_idx))
    usual = counted & ~first
    if rough is None:
        rest = rest - torch.cat([forecast(chunk) for chunk in tokens.split(_CHUNK)]).float()
    else:
        weight = usual / (rest.square().mean(1) + _TINY)
        if forecast.narrow is not None:
            rest = rest - torch.cat([forecast.narrow(chunk) for chunk in tokens.split(_CHUNK)]).float()
    with torch.autocast(x.device.type, enabled=False):
        if rough is not None:
            scores = flat @ rough
            entered = scores > scores[usual].quantile(1 - interpolated(mlp.router.shares, mlp.capacity).item())
            weight = torch.where(entered, _ENTERING * weight, weight)
            rest = rest - fit_forecast(forecast, flat, rest, weight, usual & ~entered)
        cost = (rest.square().mean(1) + _TINY).log()
        cost = torch.where(first, cost[usual].max(), cost)
        importance = usual + _FIRST * (first & counted)
        mean = (cost * importance).sum() / importance.sum()
        if not mlp.router.random:
            score = Normal(flat, importance).solve((cost - mean).unsqueeze(1), _RIDGE).squeeze(1)
            mlp.router.weight.copy_(like_bfloat16(score))
            mlp.router.cost_offset.copy_(mean)
        scores = mlp.router(flat)
        mlp.router.measure(scores[counted])
    return mlp.route(tokens, mlp.enters(scores), computed).view_as(x)


def choose_neurons(mlp: RoutedMLP, x: Tensor, weight: Tensor) -> None:
    """Give MLP' the neurons of the MLP that a linear map of x̃ explains least.

    They have the largest Σ_t a_t (h_t − its linear estimate)² ‖its column of the last map‖².

    Args:
        mlp: the MLP, and MLP' in its forecast.
        x: x̃ of some tokens, float32 [N, D].
        weight: a, float32 [N].
    """
    linears, name = inner_linears(mlp, x.shape[1])
    last, narrow = linears[name], mlp.forecast.narrow
    inner: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, args: inner.append(args[0].float()))
    mlp.compute(x.to(last.weight.dtype))
    hook.remove()
    with torch.autocast(x.device.type, enabled=False):
        unexplained = inner[0] - x @ Normal(x, weight).solve(inner[0], _RIDGE)
        share = weight @ unexplained.square() * last.weight.float().square().sum(0)
    chosen = share.topk(narrow.get_submodule(name).in_features).indices.sort().values
    for each, linear in linears.items():
        small: Any = narrow.get_submodule(each)
        rows: Any = slice(None)
        if each != name:
            rows = torch.cat([chosen + start for start in range(0, linear.out_features, last.in_features)])
        small.weight.copy_(linear.weight[:, chosen] if each == name else linear.weight[rows])
        if linear.bias is not None:
            small.bias.copy_(linear.bias[rows])


def fit_forecast(forecast: MLPForecast, x: Tensor, rest: Tensor, weight: Tensor, skips: Tensor) -> Tensor:
    """Fit W, and A B of each cluster, to what MLP' leaves; returns W x̃ + A_j B_j x̃ of all tokens, [N, D]."""
    common = Normal(x, weight).solve(rest, _RIDGE)
    forecast.linear.weight.copy_(common.t())
    linear = x @ common
    return linear if forecast.maps == 1 else linear + fit_maps(forecast, x, rest - linear, weight, skips)


def fit_maps(forecast: MLPForecast, x: Tensor, rest: Tensor, weight: Tensor, skips: Tensor) -> Tensor:
    """Fit clusters, and A B of each to the rest of the forecast; returns A_j B_j x̃ of all tokens, [N, D]."""
    forecast.centers.copy_(_directions(x[skips], forecast.maps))
    cluster, correction = forecast.cluster(x), torch.zeros_like(rest)
    for j in range(forecast.maps):
        members = (cluster == j).nonzero().squeeze(1)
        up, down = _low_rank(x[members], rest[members], weight[members], forecast.up.shape[-1])
        forecast.up[j], forecast.down[j] = up, down
        correction[members] = x[members] @ down.t() @ up.t()
    return correction


class Normal:
    """The normal equations of a weighted least-squares problem: Σ_t a_t x_t x_tᵀ and what solves them.

    Args:
        x: float32 [N, D].
        weight: a, float32 [N].
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.weighted = x * (weight / weight.sum().clamp(min=_TINY)).unsqueeze(1)
        self.moments = self.weighted.t() @ x

    def solve(self, targets: Tensor, ridge: float) -> Tensor:
        """The matrix C with the smallest Σ_t a_t ‖target_t − xᵀ_t C‖² and a slight ridge; [N, E] → [D, E]."""
        return torch.linalg.solve(self.ridged(ridge), self.weighted.t() @ targets)

    def ridged(self, ridge: float) -> Tensor:
        """The moments with a share of their mean diagonal added to it."""
        size = ridge * self.moments.diagonal().mean() + _TINY
        return self.moments + size * torch.eye(len(self.moments), device=self.moments.device)


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
    unit = F.normalize(x, dim=1)
    generator = torch.Generator().manual_seed(0)
    centers = unit[torch.randperm(len(unit), generator=generator)[:count].to(x.device)].clone()
    for _ in range(rounds):
        cluster = (unit @ centers.t()).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, cluster, unit)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
    return centers
