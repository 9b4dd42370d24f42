"""What routed MLPs leave out of a forward pass: FLOPs, counted from the shapes of parameters.

A token costs two FLOPs for each number of a matrix that it meets, the head included; embeddings are looked up. Scores
and weighted values of attention, which grow with the text, are left out: so savings are those of short texts. A token
that skips the MLP of a layer saves

    FLOPs(MLP) − FLOPs(forecast) − 2 D

with the score's 2 D; a share 1 − γ of the tokens skips.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .modeling_routed_mlp import RoutedMLP, decoder_layers, routed_mlps
from .pretrained import is_added


def capacity_for(model: Any, save: float) -> float:
    """γ of all routed MLPs at which routing leaves out a share `save` of a forward pass's FLOPs.

    Raises:
        ValueError: not even with no token entering does it leave out so much; names the largest possible.
    """
    possible = sum(_saved(mlp) for mlp in routed_mlps(model).values()) / dense_flops(model)
    if not 0.0 <= save < possible:
        largest = int(1000 * possible) / 10
        raise ValueError(
            f"save = {save!r}: routing {len(routed_mlps(model))} MLPs leaves out at most {largest} % of a forward "
            f"pass. Ask for less than {largest / 100:.3g}, or let more layers route (routed_layers)"
        )
    return 1.0 - save / possible


def saved_share(model: Any, capacity: float | list[float] | None = None) -> float:
    """The share of a forward pass's FLOPs that routing leaves out.

    Args:
        model: with routed MLPs.
        capacity: γ, one number or one per routed layer; None: the model's own.
    """
    if isinstance(capacity, list):
        shares = dict(zip(model.routed_layers, capacity, strict=True))
    else:
        shares = model.config.layer_capacities(capacity)
    saved = sum((1.0 - shares[layer]) * _saved(mlp) for layer, mlp in routed_mlps(model).items())
    return saved / dense_flops(model)


def dense_flops(model: Any) -> float:
    """FLOPs of the dense model's forward pass, per token."""
    layers = (named for named in decoder_layers(model).named_parameters() if not is_added(named[0]))
    return _flops(layers, model.config) + 2.0 * model.get_output_embeddings().weight.numel()


def _saved(mlp: RoutedMLP) -> float:
    """FLOPs that a token saves by skipping an MLP."""
    stock = _flops(named for named in mlp.named_parameters() if not is_added(named[0]))
    return stock - forecast_flops(mlp.forecast) - 2.0 * mlp.router.weight.numel()


def forecast_flops(forecast: nn.Module) -> float:
    """FLOPs of a forecast, per token that skips: of its clusters one counts."""
    maps = getattr(forecast, "maps", 1)
    return 2.0 * sum(
        p.numel() / (maps if name in ("down", "up") else 1) for name, p in forecast.named_parameters() if p.ndim > 1
    )


def _flops(named: Iterable[tuple[str, nn.Parameter]], config: Any = None) -> float:
    """Two for each number of the matrices; of experts, [E, …], as many as a token meets."""
    flops = 0.0
    for _, parameter in named:
        met = getattr(config, "num_experts_per_tok", 1) / len(parameter) if parameter.ndim == 3 else 1.0
        flops += 2.0 * met * parameter.numel() * (parameter.ndim > 1)
    return flops
