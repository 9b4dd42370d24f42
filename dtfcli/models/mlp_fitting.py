"""Fits routed MLPs to text: neurons, forecasts, scores and thresholds, by least squares in one forward pass.

Each MLP sees all tokens of the text at once, fits itself, and hands on what it will hand on in use; so layers above are
fitted to what they will see. Shape suffixes as in `modeling_routed_mlp`. Everything is float32.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modeling_routed_mlp import MLPForecast, RoutedMLP, inner_linears, like_bfloat16, routed_mlps

_RIDGE, _PULL = 1e-2, 0.05
"""Added to the diagonals of normal equations, as shares of their means: of the common map, of a cluster's own."""
_ENTERING = 0.05
"""Weight, in the forecast's second fit, of tokens that enter: γ may be another one tomorrow."""
_FIRST = 20.0
"""Weight of first tokens in the score's fit. They carry massive activations, and have to enter."""
_SAMPLE = 6000
"""Tokens by which neurons are chosen."""
_CHUNK = 8192
"""Tokens that go through an MLP together: its inner activations are many times larger than its output."""
_TINY = 1e-9


def fit_routing(
    model: Any, batches: Iterable[Mapping[str, Tensor]], on_layer: Callable[[int, int], None] | None = None
) -> None:
    """Fit forecasts, scores and thresholds of a model with routed MLPs, in one forward pass over some text.

    Args:
        model: any model with routed MLPs. Its γ is that of the fit: tokens that skip below are what a layer sees.
        batches: as in `RoutedCausalLM.pass_together`.
        on_layer: called with the number of MLPs that are fitted, and with the number of all.

    Raises:
        ValueError: no batches; activations are no finite numbers (names the layer).
    """
    mlps = routed_mlps(model)

    def fit(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        y = fit_mlp(mlp, x, counted, first)
        if on_layer is not None:
            on_layer(list(mlps).index(mlp.layer_idx) + 1, len(mlps))
        return y

    model.pass_together(batches, fit)


@torch.no_grad()
def fit_mlp(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
    """Fit forecast, score and thresholds of one MLP to text; returns what it hands on, [B, T, D].

        W = argmin Σ_t a_t ‖MLP(x̃_t) − MLP'(x̃_t) − W x̃_t‖²,   a_t = 1 / ‖MLP(x̃_t)‖²
        w = argmin Σ_t (c_t − w · x̃_t − mean)²,               c_t = ln(‖MLP(x̃_t) − f(x̃_t)‖² / D)

    and all a second time, the forecast f with little weight on tokens that enter. MLP' has the neurons that W explains
    least: those with the largest Σ_t a_t (h_t − its linear estimate)² ‖its column of the last map‖².

    Args:
        mlp: of a layer whose lower layers are fitted.
        x: x̃ of all tokens, [B, T, D].
        counted: bool [B, T], which tokens are no padding.
        first: bool [B, T], the first token of each text.

    Raises:
        ValueError: activations are no finite numbers; names the layer.
    """
    size = x.shape[-1]
    tokens = x.reshape(-1, size)
    computed = torch.cat([mlp.compute(chunk) for chunk in tokens.split(_CHUNK)])
    flat, targets = tokens.float(), computed.float()
    if not bool(targets.isfinite().all()):
        raise ValueError(
            f"layer {mlp.layer_idx}: its MLP gives numbers that are not finite on this text, so nothing can be fitted. "
            "Open the model in another dtype (float32 or bfloat16), or fit it to another text"
        )
    enters = torch.zeros_like(first.flatten())
    for last in (False, True):
        enters = _fit(mlp, flat, targets, (counted.flatten(), first.flatten(), enters), last)
    forecast = torch.cat([mlp.forecast(chunk) for chunk in tokens.split(_CHUNK)])
    return torch.where(enters.unsqueeze(1), computed, forecast.to(computed.dtype)).view_as(x)


def _fit(mlp: RoutedMLP, x: Tensor, targets: Tensor, about: tuple[Tensor, Tensor, Tensor], last: bool) -> Tensor:
    """One of the two rounds. `about`: which tokens count, come first, entered before; bool [N] each, as the result."""
    counted, first, entered = about
    usual, forecast = (counted & ~first).float(), mlp.forecast
    dtype = forecast.linear.weight.dtype
    weight = usual / (targets.square().mean(1) + _TINY) * torch.where(entered, _ENTERING, 1.0)
    rest = targets
    if forecast.narrow is not None:
        choose_neurons(mlp, x, weight)
        rest = targets - torch.cat([forecast.narrow(part) for part in x.to(dtype).split(_CHUNK)]).float()
    with torch.autocast(x.device.type, enabled=False):
        common = Normal(x, weight).solve(rest, _RIDGE)
        forecast.linear.weight.copy_(common.t())
        rest = rest - x @ common
        if last and forecast.maps > 1:
            rest = rest - fit_maps(forecast, x, rest, weight, ~entered & counted)
        cost = (rest.square().mean(1) + _TINY).log()
        cost = torch.where(first, cost[usual > 0].max(), cost)
        importance = usual + _FIRST * (first & counted)
        mean = (cost * importance).sum() / importance.sum()
        if not mlp.router.random:
            score = Normal(x, importance).solve((cost - mean).unsqueeze(1), _RIDGE).squeeze(1)
            mlp.router.weight.copy_(like_bfloat16(score))
        scores = mlp.router(x)
        mlp.router.measure(scores[counted])
    return mlp.enters(scores)


def choose_neurons(mlp: RoutedMLP, x: Tensor, weight: Tensor) -> None:
    """Give MLP' the neurons of the MLP that a linear map of x̃ explains least; tokens [N, D], weights [N]."""
    linears, name = inner_linears(mlp, x.shape[1])
    last, narrow = linears[name], mlp.forecast.narrow
    part = torch.arange(0, len(x), max(1, len(x) // _SAMPLE), device=x.device)
    inner: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, args: inner.append(args[0].float()))
    mlp.compute(x[part].to(last.weight.dtype))
    hook.remove()
    with torch.autocast(x.device.type, enabled=False):
        unexplained = inner[0] - x[part] @ Normal(x[part], weight[part]).solve(inner[0], _RIDGE)
        share = weight[part] @ unexplained.square() * last.weight.float().square().sum(0)
    width = narrow.get_submodule(name).in_features
    chosen = share.topk(width).indices.sort().values
    for each, linear in linears.items():
        small = narrow.get_submodule(each)
        if each == name:
            small.weight.copy_(linear.weight[:, chosen])
            if linear.bias is not None:
                small.bias.copy_(linear.bias)
            continue
        rows = torch.cat([chosen + start for start in range(0, linear.out_features, last.in_features)])
        small.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            small.bias.copy_(linear.bias[rows])


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
