"""Routed MLPs: a stock decoder in which some tokens skip the MLP of a layer and take a forecast of it.

For x̃, what the MLP of a layer takes (behind its norm), one token at a time:

    s = w · x̃                                     the score, float32: the predicted error of the forecast
    y = MLP(x̃)                  where s > τ(γ)    the token enters
    y = W x̃ + A_j B_j x̃         elsewhere         the forecast; j the cluster of the token's direction

An MLP knows no positions, no rows and no cache, so this is a function of one token: causal, and the same for every
batch, padding, chunk and cache. The rest of the model stays stock. Backbone parameters keep their names, and each class
is a stock class with ours in front (`RoutedLlamaForCausalLM`): there is no list of families. Everything is fitted by
least squares in one forward pass (`RoutedCausalLM.fit_routing`): each MLP sees all tokens of the text, fits itself, and
hands on what it will hand on in use.

This file and the two configuration files are all that a saved folder needs. Shape suffixes: N tokens of any rows, D
hidden size, J maps, R their rank. Scores, thresholds and fits are float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_fields import CAPACITY_GRID, threshold_place
from .configuration_routed_mlp import routed_config_class

_RIDGE, _PULL = 1e-2, 0.05
"""Added to the diagonals of normal equations, as shares of their means: of the common map, of a cluster's own."""
_ENTERING = 0.05
"""Weight, in the forecast's second fit, of tokens that enter: γ may be another one tomorrow."""
_FIRST = 20.0
"""Weight of first tokens in the score's fit. They carry massive activations, and have to enter."""
_TINY = 1e-9


class MLPRouter(nn.Module):
    """The score w · x̃ of a token and its thresholds; float32, and every number one that bfloat16 has.

    A server that casts all parameters to bfloat16 then routes as Transformers does.

    Attributes:
        weight: w, float32 [D].
        thresholds: τ, float32 [1 + len(CAPACITY_GRID)]: at the model's own γ, then on the grid.
    """

    thresholds: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.register_buffer("thresholds", torch.empty(1 + len(CAPACITY_GRID), dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Forget all."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.thresholds, torch.nan)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] → scores, float32 [N]."""
        return x.float() @ self.weight.float()

    def threshold_at(self, capacity: float, own_capacity: float) -> Tensor:
        """τ(γ), float32 0-d, interpolated on the grid; NaN where nothing was calibrated."""
        if capacity == own_capacity:
            return self.thresholds[0]
        low, high, share = threshold_place(capacity)
        return torch.lerp(self.thresholds[1 + low].float(), self.thresholds[1 + high].float(), share)

    def keep(self, capacity: float | None, scores: Tensor, share: float) -> Tensor:
        """Keep and return the (1 − share) quantile of scores [N] as τ(γ); None: at the model's own γ."""
        ordered = scores.sort(descending=True).values
        count = round(share * len(ordered))
        places = torch.tensor([count - 1, count]).clamp(0, len(ordered) - 1)
        threshold = _like_bfloat16(ordered[places].mean())
        self.thresholds[0 if capacity is None else 1 + CAPACITY_GRID.index(capacity)] = threshold
        return threshold


def _like_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


class MLPForecast(nn.Module):
    """W x̃ + A_j B_j x̃: J linear maps that share one of full rank and differ in rank R.

    Attributes:
        linear: W.
        centers: u, [J, D]: token x̃ belongs to the cluster j with the largest u_j · x̃; absent if J is 1.
        down, up: B [J, R, D] and A [J, D, R].
    """

    def __init__(self, size: int, maps: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.maps = maps if rank else 1
        if self.maps > 1:
            self.centers = nn.Parameter(torch.empty(maps, size))
            self.down = nn.Parameter(torch.empty(maps, rank, size))
            self.up = nn.Parameter(torch.empty(maps, size, rank))

    def reset_parameters(self) -> None:
        """All zero: a forecast of nothing."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] → [N, D]."""
        forecast = self.linear(x)
        if self.maps == 1:
            return forecast
        cluster = self.cluster(x)
        if len(x) == 1:
            return forecast + (self.up[cluster] @ (self.down[cluster] @ x.unsqueeze(-1))).squeeze(-1)
        for j in range(self.maps):
            places = (cluster == j).nonzero().squeeze(1)
            forecast = forecast.index_add(0, places, x[places] @ self.down[j].t() @ self.up[j].t())
        return forecast

    def cluster(self, x: Tensor) -> Tensor:
        """The cluster of each token's direction, int64 [N]."""
        return (x @ self.centers.t()).argmax(1)

    def fit_common(self, x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Fit W; returns W x̃ of all tokens, float32 [N, D]."""
        common = Normal(x, weight).solve(targets, _RIDGE)
        self.linear.weight.copy_(common.t())
        return x @ common

    def fit_maps(self, x: Tensor, rest: Tensor, weight: Tensor, skips: Tensor) -> Tensor:
        """Fit clusters, and A B of each to what W leaves; returns A_j B_j x̃ of all tokens, float32 [N, D]."""
        self.centers.copy_(_directions(x[skips], self.maps))
        cluster, correction = self.cluster(x.to(self.centers.dtype)), torch.zeros_like(rest)
        for j in range(self.maps):
            members = (cluster == j).nonzero().squeeze(1)
            up, down = _low_rank(x[members], rest[members], weight[members], self.up.shape[-1])
            self.up[j], self.down[j] = up, down
            correction[members] = x[members] @ down.t() @ up.t()
        return correction


class RoutedMLP(nn.Module):
    """An MLP that only some tokens enter; mixed in front of a stock MLP's class.

    Attributes:
        router, forecast: of this layer.
        layer_idx: of the layer.
        own_capacity: γ of the model itself.
        capacity: γ in use.
        instead: what to do in place of the usual; fitting and calibration ask for it.
        records: scores [B, T] of each pass while somebody wants them; None: nobody does.
    """

    router: MLPRouter
    forecast: MLPForecast
    layer_idx: int
    own_capacity: float
    capacity: float
    instead: "Callable[[RoutedMLP, Tensor], Tensor] | None"
    records: "list[MLPRecord] | None"

    @classmethod
    def install(cls, mlp: nn.Module, config: Any, layer_idx: int, capacity: float) -> None:
        """Make a stock MLP a routed one, in place: its parameters keep their names."""
        stock = type(mlp)
        mlp.__class__ = type(f"Routed{stock.__name__}", (cls, stock), {"__module__": __name__})
        mlp.router = MLPRouter(config.hidden_size)
        mlp.forecast = MLPForecast(config.hidden_size, config.forecast_maps, config.forecast_rank)
        vars(mlp).update(layer_idx=layer_idx, own_capacity=capacity, capacity=capacity, instead=None, records=None)

    def compute(self, x: Tensor) -> Tensor:
        """The MLP itself, for all tokens."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        if self.instead is not None:
            return self.instead(self, x)
        if self.capacity >= 1.0 and self.records is None:
            return self.compute(x)
        flat = x.reshape(-1, x.shape[-1])
        scores = self.router(flat)
        threshold = self.router.threshold_at(self.capacity, self.own_capacity) if self.capacity < 1.0 else -torch.inf
        enters = scores > threshold
        if self.records is not None:
            shape = x.shape[:-1]
            self.records.append(MLPRecord(self.layer_idx, scores.view(shape), enters.view(shape)))
        return self.route(flat, enters).view_as(x)

    def route(self, x: Tensor, enters: Tensor) -> Tensor:
        """The MLP where tokens enter, else the forecast; [N, D], bool [N] → [N, D]."""
        entering = enters.nonzero().squeeze(1)  # the one synchronization
        if len(entering) == len(x):
            return self.compute(x)
        if len(entering) == 0 and not torch.is_grad_enabled():
            return self.forecast(x)
        skipping = (~enters).nonzero().squeeze(1)
        forecast = self.forecast(x.index_select(0, skipping))
        computed = self.compute(x.index_select(0, entering)).to(forecast.dtype)
        return forecast.new_empty(x.shape).index_copy(0, skipping, forecast).index_copy(0, entering, computed)


class MLPRecord(NamedTuple):
    """How a routed MLP treated each token of a pass."""

    layer: int
    scores: Tensor
    """float32 [B, T]."""
    selected: Tensor
    """bool [B, T], True where the token entered."""


# Fitting


@torch.no_grad()
def fit_mlp(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
    """Fit forecast, score and threshold of one MLP to text; returns what it hands on, [B, T, D].

        W = argmin Σ_t a_t ‖MLP(x̃_t) − W x̃_t‖²,   a_t = 1 / ‖MLP(x̃_t)‖²
        w = argmin Σ_t (c_t − w · x̃_t − mean)²,   c_t = ln(‖MLP(x̃_t) − f(x̃_t)‖² / D)

    and both a second time, the forecast with little weight on tokens that enter.

    Args:
        mlp: of a layer whose lower layers are fitted.
        x: x̃ of all tokens, [B, T, D].
        counted: bool [B, T], which tokens are no padding.
        first: bool [B, T], the first token of each text.

    Raises:
        ValueError: activations are no finite numbers; names the layer.
    """
    size = x.shape[-1]
    computed = mlp.compute(x).reshape(-1, size)
    flat, targets = x.reshape(-1, size).float(), computed.float()
    if not bool(targets.isfinite().all()):
        raise ValueError(
            f"layer {mlp.layer_idx}: its MLP gives numbers that are not finite on this text, so nothing can be fitted. "
            "Open the model in another dtype (float32 or bfloat16), or fit it to another text"
        )
    with torch.autocast(x.device.type, enabled=False):
        enters = _fit(mlp, flat, targets, counted.flatten(), first.flatten())
        forecast = mlp.forecast(flat.to(mlp.forecast.linear.weight.dtype))
    return torch.where(enters.unsqueeze(1), computed, forecast.to(computed.dtype)).view_as(x)


def _fit(mlp: RoutedMLP, x: Tensor, targets: Tensor, counted: Tensor, first: Tensor) -> Tensor:
    """Fit to tokens [N, D]; returns who enters, bool [N]. Tokens that skip have their forecast fitted twice."""
    usual, forecast = (counted & ~first).float(), mlp.forecast
    relative, importance = usual / (targets.square().mean(1) + _TINY), usual + _FIRST * (first & counted)
    normal = Normal(x, importance)
    enters = torch.zeros_like(first)
    for last in (False, True):
        rest = targets - forecast.fit_common(x, targets, relative * torch.where(enters, _ENTERING, 1.0))
        if last and forecast.maps > 1:
            rest = rest - forecast.fit_maps(x, rest, relative * torch.where(enters, _ENTERING, 1.0), ~enters & counted)
        cost = (rest.square().mean(1) + _TINY).log()
        cost = torch.where(first, cost[usual > 0].max(), cost)
        mean = (cost * importance).sum() / importance.sum()
        mlp.router.weight.copy_(_like_bfloat16(normal.solve((cost - mean).unsqueeze(1), _RIDGE).squeeze(1)))
        scores = mlp.router(x)
        threshold = mlp.router.keep(None, scores[counted], mlp.own_capacity)
        enters = scores > threshold if mlp.own_capacity < 1 else torch.ones_like(first)
    for capacity in CAPACITY_GRID:  # of the tokens as they are here; `calibrate` measures what lower layers change
        mlp.router.keep(capacity, scores[counted], capacity)
    return enters


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
        size = (ridge * self.moments.diagonal().mean() + _TINY) * torch.eye(
            len(self.moments), device=self.moments.device
        )
        return self.moments + size


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


# Models


def routed_mlps(model: nn.Module) -> dict[int, RoutedMLP]:
    """The routed MLPs of a model, by layer index."""
    return {mlp.layer_idx: mlp for mlp in model.modules() if isinstance(mlp, RoutedMLP)}


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a stock model.

    Raises:
        ValueError: it has none that we find.
    """
    stack = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers called `layers`: it cannot be converted"
        )
    return layers


def unfit_layers(layers: Iterable[nn.Module]) -> dict[int, str]:
    """The layers whose MLP cannot route, each with the reason."""
    reasons = {}
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module):
            reasons[index] = "it has no `mlp`"
        elif any(hasattr(mlp, name) for name in ("experts", "router", "gate")):
            reasons[index] = "its MLP is a mixture of experts"
    return reasons


class RoutedBase(PreTrainedModel if TYPE_CHECKING else object):
    """Initialization of what routing adds; common to the stack and the language model."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._install()

    def _install(self) -> None:
        layers, capacities = decoder_layers(self), self.config.layer_capacities()
        unfit = unfit_layers(layers)
        for index, capacity in capacities.items():
            if index not in unfit and not isinstance(layers[index].mlp, RoutedMLP):
                RoutedMLP.install(layers[index].mlp, self.config, index, capacity)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (MLPRouter, MLPForecast)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the folder opens by `trust_remote_code=True` where dtf is not installed, and in vLLM."""
        name = type(self.config).__name__.removesuffix("Config")
        self.config.auto_map = {
            "AutoConfig": f"configuration_routed_mlp.{name}Config",
            "AutoModel": f"modeling_routed_mlp.{name}Model",
            "AutoModelForCausalLM": f"modeling_routed_mlp.{name}ForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **kwargs)


class RoutedCausalLM(RoutedBase):
    """A stock language model with routed MLPs, and what steers them."""

    @property
    def capacity(self) -> float | list[float]:
        """γ in use: the one asked for with `set_routing`, else the model's own."""
        chosen = {mlp.capacity for mlp in routed_mlps(self).values()}
        return chosen.pop() if len(chosen) == 1 else self.config.capacity

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers whose MLPs route."""
        return list(routed_mlps(self))

    def set_routing(self, mode: str = "threshold", capacity: float | None = None) -> None:
        """Choose γ.

        Args:
            mode: "threshold", the only one: there are no rows to choose the top K of.
            capacity: γ in (0, 1] of all routed MLPs; None: the model's own. Not saved.

        Raises:
            ValueError: another mode, or a capacity outside (0, 1].
        """
        if mode != "threshold":
            raise ValueError(f"routing = {mode!r}: routed MLPs route by 'threshold' alone")
        if capacity is not None and not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity = {capacity!r}: the share of tokens that enter lies above 0 and at most at 1")
        for mlp in routed_mlps(self).values():
            mlp.capacity = mlp.own_capacity if capacity is None else float(capacity)

    @contextmanager
    def routing_mode(self, mode: str = "threshold", capacity: float | None = None) -> Iterator[None]:
        """`set_routing` for the length of a `with` block."""
        before = {mlp: mlp.capacity for mlp in routed_mlps(self).values()}
        self.set_routing(mode, capacity)
        try:
            yield
        finally:
            for mlp, chosen in before.items():
                mlp.capacity = chosen

    @contextmanager
    def recorded(self) -> Iterator[list[MLPRecord]]:
        """Every pass of every routed MLP inside of a `with` block."""
        records: list[MLPRecord] = []
        for mlp in routed_mlps(self).values():
            mlp.records = records
        try:
            yield records
        finally:
            for mlp in routed_mlps(self).values():
                mlp.records = None

    def fit_routing(
        self, batches: Iterable[Mapping[str, Tensor]], on_layer: Callable[[int, int], None] | None = None
    ) -> None:
        """Fit forecasts, scores and the thresholds of the model's own γ, in one forward pass over some text.

        Args:
            batches: mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T]; all have to have
                one shape, since each MLP sees all of them at once.
            on_layer: called with the number of MLPs that are fitted, and with the number of all.
        """
        mlps = routed_mlps(self)

        def fit(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
            y = fit_mlp(mlp, x, counted, first)
            if on_layer is not None:
                on_layer(list(mlps).index(mlp.layer_idx) + 1, len(mlps))
            return y

        self._pass(batches, fit)

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]], capacities: Iterable[float] | None = None) -> None:
        """Measure thresholds: for each γ one forward pass, in which each MLP takes the quantile of the scores it sees.

        Args:
            batches: as in `fit_routing`.
            capacities: γ of the grid to measure besides the model's own; None: the whole grid.
        """
        batches = list(batches)
        for capacity in (None, *(CAPACITY_GRID if capacities is None else capacities)):

            def calibrate(
                mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor, capacity: float | None = capacity
            ) -> Tensor:
                flat, share = x.reshape(-1, x.shape[-1]), mlp.own_capacity if capacity is None else capacity
                scores = mlp.router(flat)
                threshold = mlp.router.keep(capacity, scores[counted.flatten()], share)
                enters = scores > threshold if share < 1 else torch.ones_like(scores, dtype=torch.bool)
                return mlp.route(flat, enters).view_as(x)

            self._pass(batches, calibrate)

    @torch.no_grad()
    def _pass(self, batches: Iterable[Mapping[str, Tensor]], instead: Callable[..., Tensor]) -> None:
        """One pass of the stack over all batches together, in which routed MLPs do something else."""
        batches = list(batches)
        if not batches:
            raise ValueError("batches is empty: give it text, some thousand tokens of it")
        ids = torch.cat([batch["input_ids"] for batch in batches]).to(self.device)
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        mask = torch.cat([each.to(self.device) for each in masks]).bool()
        first = mask & (mask.long().cumsum(1) == 1)
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        mlps, was_training = routed_mlps(self).values(), self.training
        self.eval()
        for mlp in mlps:
            mlp.instead = lambda mlp, x: instead(mlp, x, mask, first)
        try:
            self.get_decoder()(input_ids=ids, use_cache=False, **padded)
        finally:
            for mlp in mlps:
                mlp.instead = None
            self.train(was_training)


def routed_classes(stock: type[Any]) -> type[Any]:
    """The class of a stock one with routed MLPs, made when it is asked for."""
    name = f"Routed{stock.__name__}"
    if name not in globals():
        ours = RoutedCausalLM if name.endswith("ForCausalLM") else RoutedBase
        attributes = {
            "__module__": __name__,
            "__doc__": f"`{stock.__name__}` with routed MLPs.",
            "config_class": routed_config_class(stock.config_class),
        }
        made: Any = type(name, (ours, stock), attributes)
        if ours is RoutedCausalLM:  # saving copies these files
            made.config_class.register_for_auto_class()
            made.register_for_auto_class("AutoModelForCausalLM")
        globals()[name] = made
    return globals()[name]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`RoutedLlamaForCausalLM`, `RoutedLlamaModel` and the like, from the stock class that the name contains."""
        stock = getattr(transformers, name.removeprefix("Routed"), None) if name.startswith("Routed") else None
        if stock is None or not issubclass(stock, PreTrainedModel):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return routed_classes(stock)
