"""`model.routed_layers = "auto"`: which layers route, at which γ, from what each costs to leave out.

Leaving a layer out for all tokens costs c nats. Left out for a share s of them, those that lose least by it, it is
taken to cost c · s²: the first tokens to skip are nearly free, the last are dear. The shares that save the wanted FLOPs
at the smallest sum of costs then are s = λ / (2c), since every layer saves as many: Lagrange's condition, solved for λ
by bisection.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.data.documents import OnProgress
from dtfcli.data.targets import token_ids
from dtfcli.errors import ConfigError
from dtfcli.inspection.sensitivity import layer_costs
from dtfcli.loading.build import build_model
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.models.configuration_fields import PARTS, by_surprise, resolve_routed_layers
from dtfcli.settings import Settings

_TOKENS = 4096
"""Of training text, to measure layers on."""
_LEAST = 0.125
"""Smallest γ of a layer that routes."""
_DENSE = 0.9
"""A layer with a γ above stays dense: its router would cost more than it saves."""
_LEAST_COST = 1e-3
"""Nats: what is measured below is noise."""

Flops = Callable[[Mapping[int, float]], float]
"""γ of each routed layer → share of dense FLOPs; layers that are absent are dense."""


def choose_layers(settings: Settings, rows: Any, on_progress: OnProgress) -> Settings:
    """The settings with layers, part and capacities in the place of "auto".

    Args:
        settings: with `model.routed_layers` "auto" and `model.flops_share`.
        rows: training text, int32 [N, T].
        on_progress: called with what is measured, and the share done.

    Raises:
        ConfigError: so few FLOPs cannot be reached.
    """
    parts = [settings.model.routed_part] if settings.model.routed_part else list(PARTS)
    device = resolve_device(settings.run.device)
    dense: Any = build_model(settings.with_model(architecture="dense", routed_layers=None))
    dense = dense.to(device).eval()
    text = torch.from_numpy(token_ids(rows[: max(1, _TOKENS // rows.shape[1])])).to(device)
    costs: dict[str, dict[int, float]] = {}
    dtype = compute_dtype(settings.run.dtype, device)
    for part in parts:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            costs[part] = layer_costs(dense, text, part, partial(_tell, on_progress, part))
    del dense
    return _with_cheapest(settings, costs)


def _tell(on_progress: OnProgress, part: str, done: int, of: int) -> None:
    on_progress(f"Measuring what each layer costs to leave out ({part})", done / of)


def unmeasured(settings: Settings) -> Settings:
    """The settings with "auto" replaced as if all layers cost the same: for estimates before anything was measured."""
    if settings.model.routed_layers != "auto":
        return settings
    part = settings.model.routed_part or PARTS[0]
    return _with_cheapest(settings, {part: dict.fromkeys(candidates(settings, 10**6), 1.0)})


def candidates(settings: Settings, num_layers: int) -> list[int]:
    """Layers that may route: with surprise every odd one, else all."""
    model = settings.model
    edges = model.dense_edges or 0
    if by_surprise({"architecture": model.architecture, "score": model.score}):
        return resolve_routed_layers("alternate", edges, num_layers)
    return list(range(edges, num_layers - edges))


def _with_cheapest(settings: Settings, costs: Mapping[str, Mapping[int, float]]) -> Settings:
    """The settings with the part whose layers can save the FLOPs at the smallest cost."""
    wanted = settings.model.flops_share
    assert wanted is not None, "settings say so"
    best: tuple[float, str, dict[int, float]] | None = None
    for part, own in costs.items():
        flops, layers = _flops_of(settings, part)
        found = shares_at({layer: own[layer] for layer in layers if layer in own}, wanted, flops)
        if found is None:
            continue
        total = sum(max(own[layer], _LEAST_COST) * (1 - share) ** 2 for layer, share in found.items())
        if best is None or total < best[0]:
            best = total, part, found
    if best is None:
        raise ConfigError(
            f"model.flops_share = {wanted:g}: not even γ = {_LEAST:g} in every layer saves so much of this model; ask "
            "for more, or let model.routed_part be the block."
        )
    _, part, found = best
    shares: Any = [round(found[layer], 3) for layer in sorted(found)]
    if settings.model.budget == "model":
        shares = round(sum(shares) / len(shares), 3)
    return settings.with_model(routed_layers=sorted(found), capacity=shares, routed_part=part, flops_share=None)


def _flops_of(settings: Settings, part: str) -> tuple[Flops, list[int]]:
    """γ of each routed layer → share of dense FLOPs; and the layers that may route."""
    dense: Any = build_model(settings.with_model(architecture="dense", routed_layers=None), meta=True)
    layers = candidates(settings, dense.config.num_hidden_layers)
    fields = {"routed_layers": layers, "capacity": 0.5, "routed_part": part, "flops_share": None}
    model, length = build_model(settings.with_model(**fields), meta=True), settings.data.seq_len
    whole = forward_flops_per_token(model, length, dense=True)
    return lambda shares: forward_flops_per_token(model, length, shares=shares) / whole, layers


def shares_at(costs: Mapping[int, float], wanted: float, flops: Flops) -> dict[int, float] | None:
    """γ of each layer that is to route, such that the model takes the wanted share of dense FLOPs; None: impossible.

    Args:
        costs: of leaving out each layer, nats.
        wanted: share of dense FLOPs.
        flops: what they take.
    """
    dear = {layer: max(cost, _LEAST_COST) for layer, cost in costs.items()}
    found = _bisect(dear, wanted, flops)
    while found and max(found.values()) > _DENSE:  # the dearest stays dense, if the others can make up for it
        del dear[max(dear, key=lambda layer: dear[layer])]
        fewer = _bisect(dear, wanted, flops) if dear else None
        if fewer is None:
            break
        found = fewer
    return found


def _bisect(costs: Mapping[int, float], wanted: float, flops: Flops) -> dict[int, float] | None:
    def at(scale: float) -> dict[int, float]:
        return {layer: 1.0 - min(1.0 - _LEAST, scale / (2 * cost)) for layer, cost in costs.items()}

    low, high = 0.0, 2 * max(costs.values())
    if flops(at(high)) > wanted:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if flops(at(middle)) > wanted else (low, middle)
    return at(high)
