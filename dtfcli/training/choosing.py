"""`model.routed_layers = "auto"`: which layers route, at which γ, from what skipping each of them costs.

A model in which half of the tokens skip every layer that may route is fitted (`models.fitting`). For each of these
layers is measured by how much the loss falls when all tokens enter it, in the others half: c nats. Fewer or more that
skip, those that are predicted to lose least, lose E(s) of a layer's energy and are taken to cost c · E(s) / E(½). Every
layer saves as many FLOPs a token, so the cheapest shares are those where the last token costs the same everywhere, λ
(Lagrange):

    s = argmin c · E(s) / E(½) − λ · s

with the λ, found by bisection, that saves the FLOPs asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.data.documents import OnProgress
from dtfcli.data.targets import token_ids
from dtfcli.errors import ConfigError
from dtfcli.loading.build import build_model
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.models.configuration_fields import PARTS, resolve_routed_layers
from dtfcli.settings import Settings

_FIT_TOKENS_PER_UNIT = 16
"""Of training text, for each unit of the hidden size: half of what a run is fitted to."""
_TOKENS = 4096
"""Of training text, to measure layers on."""
_LEAST = 0.125
"""Smallest γ of a layer that routes."""
_DENSE = 0.9
"""A layer with a γ above stays dense: its router would cost more than it saves."""
_LEAST_COST = 1e-3
"""Nats: what is measured below is noise."""
_DEAREST = 1e6
"""Nats a token: no price above is tried."""
_GUESSED_POINTS = 64

Flops = Callable[[Mapping[int, float]], float]
"""γ of each routed layer → share of dense FLOPs; layers that are absent are dense."""
Costs = Mapping[int, Sequence[float]]
"""What each layer costs, nats, at shares of skipping tokens from 0 to 1 in even steps."""


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
    return _with_cheapest(settings, {part: skipping_costs(settings, part, rows, on_progress) for part in parts})


@torch.no_grad()
def skipping_costs(settings: Settings, part: str, rows: Any, on_progress: OnProgress) -> dict[int, list[float]]:
    """What skipping costs in each layer that may route, by the share of tokens that skip it."""
    device = resolve_device(settings.run.device)
    dtype = compute_dtype(settings.run.dtype, device)
    dense = build_model(settings.with_model(architecture="dense", routed_layers=None), meta=True)
    layers = candidates(settings, dense.config.num_hidden_layers)
    bypass = settings.model.bypass or "identity"
    score = "forecast_error" if bypass == "forecast" else "update_size"
    fields = {"architecture": "dtf", "score": score, "bypass": bypass, "budget": "layer", "routed_part": part}
    model: Any = build_model(settings.with_model(**fields, routed_layers=layers, capacity=0.5, flops_share=None))
    model = model.to(device).eval()
    tokens = max(_TOKENS, _FIT_TOKENS_PER_UNIT * model.config.hidden_size)
    size, count = rows.shape[1], settings.training.micro_batch_size
    text = torch.from_numpy(token_ids(rows[: max(1, tokens // size)])).to(device).split(count)
    measured = torch.from_numpy(token_ids(rows[: max(1, _TOKENS // size)])).to(device).split(count)
    costs: dict[int, list[float]] = {}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        what = f"Measuring what skipping costs ({part})"
        curves = model.fit_routing(
            [{"input_ids": batch} for batch in text], lambda done, of: on_progress(what, 0.5 * done / of)
        )
        routed = _loss(model, measured)
        for done, (layer, curve) in enumerate(curves.items(), 1):
            with _all_enter(model, layer):
                cost = routed - _loss(model, measured)
            half = curve[len(curve) // 2].clamp(min=_LEAST_COST)
            costs[layer] = (max(cost, _LEAST_COST) * curve / half).tolist()
            on_progress(what, 0.5 + 0.5 * done / len(curves))
    return costs


def _loss(model: Any, batches: Sequence[torch.Tensor]) -> float:
    """Nats per token."""
    how = {"use_cache": False, "output_logits": False}
    nats = [model(input_ids=rows, labels=rows, **how).lm_loss * len(rows) for rows in batches]
    return float(torch.stack(nats).sum() / sum(len(rows) for rows in batches))


@contextmanager
def _all_enter(model: Any, layer: int) -> Iterator[None]:
    """All tokens enter one layer."""
    thresholds = model.model.routers[layer].thresholds
    own = thresholds[0].clone()
    thresholds[0] = -torch.inf
    try:
        yield
    finally:
        thresholds[0] = own


def unmeasured(settings: Settings) -> Settings:
    """The settings with "auto" replaced as if all layers cost the same: for estimates before anything was measured."""
    if settings.model.routed_layers != "auto":
        return settings
    part = settings.model.routed_part or PARTS[0]
    alike = [(i / _GUESSED_POINTS) ** 2 for i in range(_GUESSED_POINTS + 1)]
    return _with_cheapest(settings, {part: dict.fromkeys(candidates(settings, 10**6), alike)})


def candidates(settings: Settings, num_layers: int) -> list[int]:
    """Layers that may route: every second one, since what two neighbors lose adds up."""
    return resolve_routed_layers("alternate", settings.model.dense_edges or 0, num_layers)


def _with_cheapest(settings: Settings, costs: Mapping[str, Costs]) -> Settings:
    """The settings with the part whose layers can save the FLOPs at the smallest cost."""
    wanted = settings.model.flops_share
    assert wanted is not None, "settings say so"
    best: tuple[float, str, dict[int, float]] | None = None
    for part, own in costs.items():
        flops, layers = _flops_of(settings, part)
        found = shares_at({layer: own[layer] for layer in layers if layer in own}, wanted, flops)
        if found is None:
            continue
        total = sum(_cost_at(own[layer], 1 - share) for layer, share in found.items())
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


def _cost_at(costs: Sequence[float], share: float) -> float:
    return costs[round(share * (len(costs) - 1))]


def shares_at(costs: Costs, wanted: float, flops: Flops) -> dict[int, float] | None:
    """γ of each layer that is to route, such that the model takes the wanted share of dense FLOPs; None: impossible.

    Args:
        costs: of each layer.
        wanted: share of dense FLOPs.
        flops: what they take.
    """
    left = dict(costs)
    found = _bisect(left, wanted, flops)
    while found and max(found.values()) > _DENSE:  # the dearest stays dense, if the others can make up for it
        del left[max(found, key=found.__getitem__)]
        fewer = _bisect(left, wanted, flops) if left else None
        if fewer is None:
            break
        found = fewer
    return found


def _bisect(costs: Costs, wanted: float, flops: Flops) -> dict[int, float] | None:
    def at(price: float) -> dict[int, float]:
        return {layer: 1.0 - _cheapest_share(own, price) for layer, own in costs.items()}

    low, high = 0.0, 1.0
    while flops(at(high)) > wanted:
        if high > _DEAREST:
            return None
        high *= 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if flops(at(middle)) > wanted else (low, middle)
    return at(high)


def _cheapest_share(costs: Sequence[float], price: float) -> float:
    """The share of tokens that skip, at most 1 − `_LEAST`, with the smallest cost minus price · share."""
    steps = len(costs) - 1
    most = int(steps * (1.0 - _LEAST))
    return min(range(most + 1), key=lambda i: costs[i] - price * i / steps) / steps
