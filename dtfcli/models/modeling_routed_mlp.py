"""Routed MLPs: a stock decoder in which some tokens skip the MLP of a layer and take a forecast of it.

For x̃, which the MLP of a layer takes (behind its norm), one token at a time:

    s = w · x̃                                       the score, float32: predicts what skipping costs
    y = MLP(x̃)                    where s > τ(γ)    the token enters
    y = W x̃ + A_j B_j x̃ + MLP'(x̃)  elsewhere        the forecast; j is the cluster of the token's direction, and
                                                   MLP' has a few of the neurons of the MLP

An MLP knows no positions, no rows and no cache, so this is a function of one token: causal, and the same for every
batch, padding, chunk and cache. The rest of the model stays stock. Backbone parameters keep their names, and each class
is a stock class with ours in front (`RoutedLlamaForCausalLM`): there is no list of families. `mlp_fitting` fits all.

This file and the two configuration files are all that a saved folder needs. Shape suffixes: N tokens of any rows, D
hidden size, F neurons of the MLP, J maps, R their rank. Scores and thresholds are float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_routed_mlp import routed_config_class

GRID = 32
"""Thresholds are measured for γ = 0, 1 / GRID … 1; others are interpolated."""


class MLPRouter(nn.Module):
    """The score w · x̃ of a token and its thresholds; float32, and every number one that bfloat16 has.

    A server that casts all to bfloat16 then routes as Transformers does.

    Attributes:
        weight: w, float32 [D]; of a random router as it was drawn.
        shares: of the tokens that enter this layer at the γ of the grid, float32 [GRID + 1]. Layers share γ as the
            survey finds best; their mean is γ, unless first tokens alone are more.
        thresholds: τ at the γ of the grid, each a sum of two numbers, float32 [2, GRID + 1]; NaN: not fitted.
        cost_offset: float32 0-d: a score plus this is the predicted cost c of skipping (`mlp_survey.token_costs`).
        current: γ in use and its threshold, float32 0-d; None: to be looked up.
    """

    weight: Tensor
    shares: Tensor
    thresholds: Tensor
    cost_offset: Tensor

    def __init__(self, size: int, random: bool = False) -> None:
        super().__init__()
        self.random, weight = random, torch.empty(size, dtype=torch.float32)
        self.register_buffer("weight", weight) if random else self.register_parameter("weight", nn.Parameter(weight))
        self.register_buffer("shares", torch.empty(GRID + 1, dtype=torch.float32))
        self.register_buffer("thresholds", torch.empty(2, GRID + 1, dtype=torch.float32))
        self.register_buffer("cost_offset", torch.empty((), dtype=torch.float32))
        self.current: tuple[float, Tensor] | None = None

    def reset_parameters(self) -> None:
        """Forget all; a random router draws its weight."""
        nn.init.normal_(self.weight, std=float(self.random))
        self.weight.copy_(like_bfloat16(self.weight))
        nn.init.constant_(self.thresholds, torch.nan)
        nn.init.constant_(self.cost_offset, torch.nan)
        self.shares.copy_(torch.arange(GRID + 1) / GRID)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] → scores, float32 [N], whatever autocast says; no gradient: they only choose."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):  # a decoded token does without contexts
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        return x.float() @ self.weight.float()

    def threshold(self, capacity: float) -> Tensor:
        """τ(γ), float32 0-d; ValueError if nothing was fitted."""
        if self.current is None or self.current[0] != capacity:
            threshold = interpolated(self.thresholds.float().sum(0), capacity)
            if bool(threshold.isnan()):
                raise ValueError(
                    "routed MLPs are not fitted to text: `dtf convert` does it, or `fit_routing(model, batches)`"
                )
            self.current = (capacity, threshold)
        return self.current[1]

    def measure(self, scores: Tensor) -> None:
        """Keep the quantiles of scores [N] that let the layer's shares of the tokens enter as thresholds."""
        self.keep(torch.stack([quantile(scores, share) for share in self.shares.tolist()]))

    def keep(self, thresholds: Tensor) -> None:
        """Keep thresholds at the γ of the grid, float32 [GRID + 1]."""
        self.thresholds[0] = like_bfloat16(thresholds)
        self.thresholds[1] = like_bfloat16(thresholds - self.thresholds[0])
        self.current = None

    def _apply(self, fn: Any, recurse: bool = True) -> "MLPRouter":
        self.current = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.current = None
        super()._load_from_state_dict(*args, **kwargs)


def quantile(scores: Tensor, share: float) -> Tensor:
    """The threshold, 0-d, that a share of scores [N] lies above: halfway between two of them."""
    ordered = scores.sort(descending=True).values
    count = round(share * len(ordered))
    return ordered[max(0, count - 1) : count + 1].mean() if count else ordered[0]


def like_bfloat16(x: Tensor) -> Tensor:
    """The nearest numbers that bfloat16 has, float32."""
    return x.to(torch.bfloat16).float()


def interpolated(table: Tensor, capacity: float) -> Tensor:
    """The value at γ of a table over the grid, float32 [GRID + 1] → 0-d."""
    low = min(int(capacity * GRID), GRID - 1)
    return torch.lerp(table[low].float(), table[low + 1].float(), capacity * GRID - low)


class MLPForecast(nn.Module):
    """W x̃ + MLP'(x̃), and with several maps A_j B_j x̃ too, j the cluster of the token's direction.

    Attributes:
        linear: W.
        narrow: MLP', the stock module with a few of the MLP's neurons; None: there are none.
        centers: u, [J, D]: token x̃ belongs to the cluster j with the largest u_j · x̃; absent if J is 1.
        down, up: B [J, R, D] and A [J, D, R].
    """

    narrow: Any

    def __init__(self, mlp: nn.Module, size: int, width: int, maps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.narrow = narrowed(mlp, size, width) if width else None
        self.maps = maps
        if maps > 1:
            rank = max(1, size // 16)
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
        if self.narrow is not None:
            forecast = forecast + self.narrow(x)
        if self.maps == 1:
            return forecast
        correct = self.by_cluster if x.device.type == "cpu" else self.together
        return forecast + correct(x, self.cluster(x)).to(forecast.dtype)

    def cluster(self, x: Tensor) -> Tensor:
        """j, the cluster of each token's direction, int64 [N]."""
        return (x.float() @ self.centers.float().t()).argmax(1)

    def by_cluster(self, x: Tensor, cluster: Tensor) -> Tensor:
        """A_j B_j x̃ of tokens [N, D] in clusters j, int64 [N]; one cluster after the other."""
        if len(x) == 1:
            return x.float() @ self.down[j := int(cluster)].float().t() @ self.up[j].float().t()
        order, counts = cluster.argsort(), cluster.bincount(minlength=self.maps).tolist()
        parts = zip(x.index_select(0, order).split(counts), self.down, self.up, strict=True)
        y = [rounded_up(lambda x, a=a, b=b: x @ b.t() @ a.t(), x_j) for x_j, b, a in parts if len(x_j) or not len(x)]
        return torch.cat(y).index_select(0, order.argsort())

    def together(self, x: Tensor, cluster: Tensor) -> Tensor:
        """The same by two products with all maps; of a GPU's time, starting kernels takes the most."""
        inner = (x @ self.down.flatten(0, 1).t()).unflatten(1, (self.maps, -1))
        chosen = F.one_hot(cluster, self.maps).unsqueeze(2).to(inner.dtype)
        return torch.einsum("njr,jdr->nd", inner * chosen, self.up)


ROWS = 16
"""Numbers of tokens are rounded up to a multiple: oneDNN makes a kernel for each number that it meets in bfloat16."""


def rounded_up(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), a function of each token, [N, D] → [N, E]; in low precision of a few more tokens, which are dropped."""
    low = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
    more = -len(x) % ROWS if low and len(x) > ROWS else 0
    return f(F.pad(x, (0, 0, 0, more)))[: len(x)] if more else f(x)


def inner_linears(mlp: nn.Module, size: int) -> tuple[dict[str, nn.Linear], str]:
    """The linear maps of an MLP by name, and the name of the last, D ← F; the others are F ← D, or several F in one.

    ValueError if it has another form.
    """
    linears = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    last = next((name for name in reversed(linears) if linears[name].out_features == size), None)
    others = [linear for name, linear in linears.items() if name != last]
    if (
        last is None
        or not others
        or any(o.in_features != size or o.out_features % linears[last].in_features for o in others)
    ):
        raise ValueError(f"{type(mlp).__name__} is no MLP of linear maps from D to F neurons and back")
    return linears, last


def narrowed(mlp: nn.Module, size: int, width: int) -> nn.Module | None:
    """A module like an MLP, with `width` neurons; its weights are not set. None: neurons share a parameter."""
    linears, last = inner_linears(mlp, size)
    neurons, narrow = linears[last].in_features, object.__new__(type(mlp))
    shared = {name: child for name, child in mlp.named_children() if name not in linears}  # an activation's parameters
    over_neurons = (len(weight) == neurons for child in shared.values() for weight in child.parameters() if weight.ndim)
    if next(mlp.parameters(recurse=False), None) is not None or any(over_neurons):
        return None
    own = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(mlp).items()}  # hooks, too
    vars(narrow).update(own, _modules={}, **shared)
    for name, linear in linears.items():
        sizes = (width, size) if name == last else (size, linear.out_features // neurons * width)
        narrow._modules[name] = nn.Linear(*sizes, bias=linear.bias is not None)
    return narrow


class RoutedMLP(nn.Module):
    """An MLP that only some tokens enter; mixed in front of a stock MLP's class.

    Attributes:
        router, forecast: of this layer.
        layer_idx: of the layer.
        capacity: γ in use.
        instead: what to do in place of the usual; fitting and calibration ask for it.
        records: scores [B, T] of each pass while somebody wants them; None: nobody does.
    """

    router: MLPRouter
    forecast: MLPForecast
    layer_idx: int
    capacity: float
    instead: "Callable[[RoutedMLP, Tensor], Tensor] | None"
    records: "list[MLPRecord] | None"

    @classmethod
    def install(cls, mlp: nn.Module, config: Any, layer_idx: int, capacity: float) -> None:
        """Make a stock MLP a routed one, in place: its parameters keep their names."""
        stock = type(mlp)
        linears, last = inner_linears(mlp, config.hidden_size)
        width = round(config.forecast_width * linears[last].in_features)
        forecast = MLPForecast(mlp, config.hidden_size, width, config.forecast_maps)
        mlp.__class__ = type(f"Routed{stock.__name__}", (cls, stock), {"__module__": __name__})
        mlp.router, mlp.forecast = MLPRouter(config.hidden_size, config.architecture == "random"), forecast
        vars(mlp).update(layer_idx=layer_idx, capacity=capacity, instead=None, records=None)

    def compute(self, x: Tensor) -> Tensor:
        """The MLP itself, for all tokens."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        if not isinstance(x, Tensor):  # vLLM tries it before weights are loaded: no threshold may be looked up
            raise TypeError("torch.fx cannot trace a routed MLP: its way depends on the data")
        if self.instead is not None:
            return self.instead(self, x)
        if self.capacity == 1.0 and self.records is None and not torch.is_grad_enabled():
            return self.compute(x)
        scores = self.router(flat := x.reshape(-1, x.shape[-1]))
        enters = self.enters(scores)
        if self.records is not None:
            shape, threshold = x.shape[:-1], self.router.threshold(self.capacity)
            self.records.append(MLPRecord(self.layer_idx, scores.view(shape), enters.view(shape), threshold))
        return self.route(flat, enters).view_as(x)

    def enters(self, scores: Tensor) -> Tensor:
        """Which tokens enter, bool [N], by their scores [N]."""
        if self.capacity in (0.0, 1.0):
            return torch.full_like(scores, self.capacity, dtype=torch.bool)
        return scores > self.router.threshold(self.capacity)

    def route(self, x: Tensor, enters: Tensor, computed: Tensor | None = None) -> Tensor:
        """The MLP where tokens enter, else the forecast; [N, D], bool [N] → [N, D]; `computed`: MLP(x), where known."""
        count = int(enters if len(x) == 1 else enters.count_nonzero())  # the one synchronization
        if not torch.is_grad_enabled():  # else both run, on no token too: processes count on every parameter's gradient
            if count == len(x):
                return self.compute(x) if computed is None else computed
            if count == 0:
                return self.forecast(x)
        order = enters.argsort(stable=True)  # tokens that skip come first
        skipping, entering = x.index_select(0, order).split([len(x) - count, count])
        forecast = rounded_up(self.forecast, skipping)
        known = None if computed is None else computed.index_select(0, order[len(skipping) :])
        entered = rounded_up(self.compute, entering) if known is None else known
        return torch.cat([forecast, entered.to(forecast.dtype)]).index_select(0, order.argsort())


class MLPRecord(NamedTuple):
    """How a routed MLP treated each token of a pass: scores, float32 [B, T], who entered, bool, and τ(γ), float32."""

    layer: int
    scores: Tensor
    selected: Tensor
    threshold: Tensor


# Models


def routed_mlps(model: nn.Module) -> dict[int, RoutedMLP]:
    """The routed MLPs of a model, by layer index."""
    return {mlp.layer_idx: mlp for mlp in model.modules() if isinstance(mlp, RoutedMLP)}


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a stock model; ValueError if it has none that we find."""
    stack = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name in ("layers", "h"):  # the latter as GPT-2 had it
        if isinstance(layers := getattr(stack, name, None), nn.ModuleList):
            return layers
    raise ValueError(f"{type(model).__name__} has no decoder layers called `layers` or `h`: it cannot be converted")


class RoutedBase(PreTrainedModel if TYPE_CHECKING else object):
    """Initialization of what routing adds; common to the stack and the language model."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._install()

    def _install(self) -> None:
        layers = decoder_layers(self)
        for index, capacity in self.config.layer_capacities().items():
            if not isinstance(layers[index].mlp, RoutedMLP):
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
    """A stock language model with routed MLPs, and what steers them.

    Attributes:
        capacity_override: γ asked for with `set_routing`; None: the model's own.
    """

    routing = causal_routing = "threshold"
    capacity_override: float | None = None

    def __call__(self, *args: Any, output_routing: bool = False, **kwargs: Any) -> Any:
        """As in Transformers; with `output_routing` the output has `routing`, an `MLPRecord` for each routed layer."""
        if not output_routing:
            return super().__call__(*args, **kwargs)
        with self.recorded() as records:
            output = super().__call__(*args, **kwargs)
        output.routing = tuple(records)
        return output

    @property
    def is_fitted(self) -> bool:
        """Whether every routed MLP knows its thresholds, forecast and score."""
        return not any(bool(mlp.router.thresholds.isnan().any()) for mlp in routed_mlps(self).values())

    is_calibrated = is_fitted

    def router_scalars(self) -> dict[int, dict[str, float]]:
        """For each routed layer its threshold at the γ in use, and `cost_offset`."""
        routers = {layer: (mlp.router, mlp.capacity) for layer, mlp in routed_mlps(self).items()}
        return {
            layer: {"threshold": router.threshold(capacity).item(), "cost_offset": router.cost_offset.item()}
            for layer, (router, capacity) in routers.items()
        }

    @property
    def capacity(self) -> float | list[float]:
        """γ in use: the one asked for with `set_routing`, else the model's own."""
        return self.config.capacity if self.capacity_override is None else self.capacity_override

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers whose MLPs route."""
        return list(routed_mlps(self))

    def set_routing(self, mode: str = "threshold", capacity: float | None = None) -> None:
        """Choose γ; ValueError if it is not in (0, 1], or the mode another one.

        Args:
            mode: "threshold", the only one: there are no rows to choose the top K of.
            capacity: γ of all routed MLPs; None: the model's own. Not saved.
        """
        if mode != "threshold":
            raise ValueError(f"routing = {mode!r}: routed MLPs route by 'threshold' alone")
        if capacity is not None and not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity = {capacity!r}: the share of tokens that enter lies above 0 and at most at 1")
        self.capacity_override, shares = capacity, self.config.layer_capacities(capacity)
        for mlp in routed_mlps(self).values():
            mlp.capacity = shares[mlp.layer_idx]

    @contextmanager
    def routing_mode(self, mode: str = "threshold", capacity: float | None = None) -> Iterator[None]:
        """`set_routing` for the length of a `with` block."""
        before = self.capacity_override
        self.set_routing(mode, capacity)
        try:
            yield
        finally:
            self.set_routing(mode, before)

    def recorded(self) -> AbstractContextManager[list[MLPRecord]]:
        """Every pass of every routed MLP inside of a `with` block."""
        return self._with("records", [])

    def replaced(self, instead: Callable[[RoutedMLP, Tensor], Tensor]) -> AbstractContextManager[Any]:
        """Routed MLPs do something else inside of a `with` block: a function of the MLP and x̃, [..., D] → [..., D]."""
        return self._with("instead", instead)

    @contextmanager
    def _with(self, name: str, value: Any) -> Iterator[Any]:
        """An attribute of all routed MLPs has another value inside of a `with` block."""
        before = {mlp: getattr(mlp, name) for mlp in routed_mlps(self).values()}
        for mlp in before:
            setattr(mlp, name, value)
        try:
            yield value
        finally:
            for mlp, other in before.items():
                setattr(mlp, name, other)

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]], capacities: Iterable[float] | None = None) -> None:
        """Correct thresholds on text that nothing was fitted to; `mlp_fitting` does it, so dtf has to be installed."""
        import_module("dtfcli.models.mlp_fitting").calibrate(self, batches, capacities)


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
