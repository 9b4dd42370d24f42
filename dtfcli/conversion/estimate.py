"""What a conversion will take, on paper: its size, and the memory and processor time of each part.

A model on the meta device gives the shapes. Peaks count the tensors that live at the worst moment of a part; allocators
hold some more. Letters as in `modeling_routed_mlp`; k is the share of tokens that forecasts are fitted to.
"""

import math
import operator
import time
from dataclasses import dataclass
from typing import Any

import torch

from dtfcli.conversion.convert import DIAL_TOKENS, ConversionOptions, check_dense, chosen_capacity, name_of, route
from dtfcli.conversion.dial import SAVINGS, saved_share
from dtfcli.conversion.measure import rows_together
from dtfcli.conversion.report import Part
from dtfcli.conversion.text import LENGTH, MEASURE_TOKENS, wanted_tokens
from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.cost.peak import matmul_peak, reset_resident_peak, resident
from dtfcli.loading.build import known_config
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.loading.load import explained_load_errors, weights_dtype
from dtfcli.loading.quantization import weight_bytes
from dtfcli.loading.source import ModelSource
from dtfcli.models.conversion import from_config
from dtfcli.models.least_squares import CHUNK
from dtfcli.models.mlp_survey import DIFFERENTIATED, SURVEYED, TOGETHER, kept_share
from dtfcli.models.modeling_routed_mlp import inner_linears, routed_mlps
from dtfcli.models.stock import attention_shape

_OF_PEAK = 0.5
"""Share of the machine's peak that a conversion of SmolLM2-135M reached."""
_KEPT = 400_000_000
"""Bytes that a program on a CPU keeps after the survey: kernels that oneDNN made, and memory freed in pieces."""


@dataclass(frozen=True)
class Estimate:
    """A conversion before it is done.

    Attributes:
        model, parameters: the dense model's name, and how many it has.
        capacity, saving: γ, and the share of the FLOPs that it leaves out.
        routed_layers: indices.
        stays_dense: layers whose MLP cannot route, with the reason.
        fit_tokens: to fit to.
        weights_bytes, added_bytes: of the dense model, and what routing adds.
        device, dtype, precision: where weights lie, their precision, and the computation's.
        parts: of the work, each with processor seconds and peak.
    """

    model: str
    parameters: int
    capacity: float
    saving: float
    routed_layers: list[int]
    stays_dense: dict[int, str]
    fit_tokens: int
    weights_bytes: int
    added_bytes: int
    device: str
    dtype: str
    precision: str
    parts: list[Part]


def estimate(source: ModelSource, options: ConversionOptions, tokens: int | None = None) -> Estimate:
    """Estimate a conversion that fits routed MLPs.

    Args:
        source, options: of the conversion; a configuration is enough.
        tokens: of the text, to fit; None: as many as are wanted.

    Raises:
        ConfigError, CheckpointError: it cannot be routed, or save so much.
    """
    device = resolve_device(str(options.loading["device"]))
    with explained_load_errors(source):
        config = known_config(source)
        check_dense(source, config)
        saved = None if source.kind == "gguf" or source.is_adapter else config.dtype
        dtype = weights_dtype(saved, options.loading["dtype"], device)
        with torch.device("meta"):
            dense = from_config(config, dtype=dtype)
    with torch.device("meta"):
        model, stays_dense = route(dense, options)
    model.config.capacity = chosen_capacity(model, options)
    model.set_routing()
    precision, tokens = compute_dtype("auto", device), tokens or wanted_tokens(dense.config)
    most, flops = peaks(model, weight_bytes(dense), tokens, precision), _flops(model, tokens)
    base = resident("VmRSS") if device.type == "cpu" and reset_resident_peak() else 0
    kept = {"Fitting": _KEPT, "Measuring": _KEPT} if base else {}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    speeds = [_OF_PEAK * (matmul_peak(device, kind, clock) or math.nan) for kind in (precision, torch.float32)]
    parts = [
        Part(name, sum(map(operator.truediv, flops[name], speeds)), base + kept.get(name, 0) + peak)
        for name, peak in most.items()
    ]
    return Estimate(
        model=name_of(source),
        parameters=dense.num_parameters(),
        capacity=model.config.capacity,
        saving=saved_share(model, model.config.capacity),
        routed_layers=list(model.config.layer_capacities()),
        stays_dense=stays_dense,
        fit_tokens=tokens,
        weights_bytes=weight_bytes(dense),
        added_bytes=weight_bytes(model) - weight_bytes(dense),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        precision=str(precision).removeprefix("torch."),
        parts=parts,
    )


def peaks(model: Any, weights: int, tokens: int, precision: torch.dtype) -> dict[str, int]:
    """Bytes of tensors at the worst moment of each part."""
    config, held = model.config, weight_bytes(model)
    d, f, vocabulary = config.hidden_size, _neurons(model), config.vocab_size
    w, c, k = model.dtype.itemsize, precision.itemsize, kept_share(config.capacity)
    cast = weights * c // w if c < w else 0  # autocast keeps its copies of the weights
    queries, keys, head_size = attention_shape(config)
    heads = 2 * head_size * (queries + keys)
    saved = config.num_hidden_layers * (c * (heads + 4 * f) + 24 * d) + (c + 20) * vocabulary
    surveyed = max(SURVEYED, 2 * d) * (d * (2 * w + c + 16) + 12 * f)
    passed = min(tokens, CHUNK) * (3 * c * f + 12 * d)
    fitted = tokens * d * (2 * w + c + k * (w + c + 12)) + 4 * (f + 3 * d) * d
    logits = rows_together(vocabulary, LENGTH) * LENGTH * vocabulary * (c + 20)
    return {
        "Opening": weights,
        "Surveying": held + max(cast + TOGETHER * saved, cast + surveyed),
        "Fitting": held + cast + max(tokens * d * 3 * w + passed, fitted),
        "Measuring": held + 2 * cast + logits,
    }


def _flops(model: Any, tokens: int) -> dict[str, tuple[float, float]]:
    """FLOPs of each part, in the precision of the computation and in float32."""
    config, routed = model.config, len(model.config.layer_capacities())
    d, f, k = config.hidden_size, _neurons(model), kept_share(config.capacity)
    forward = forward_flops_per_token(model, LENGTH, dense=True)
    differentiated, surveyed, solved = max(DIFFERENTIATED, 2 * d), max(SURVEYED, 2 * d), d**3 * 8 / 3
    measured = 2 * MEASURE_TOKENS + len(SAVINGS) * DIAL_TOKENS
    survey = surveyed * (14 * d + 4 * f) * d + 3 * solved + 2 * d * d * f
    fit = tokens * (2 + 12 * k) * d * d + (1 + 2 * config.forecast_maps) * solved
    return {
        "Opening": (0.0, 0.0),
        "Surveying": ((2 * differentiated + surveyed) * forward, routed * survey),
        "Fitting": (tokens * forward, routed * fit),
        "Measuring": (measured * forward, 0.0),
    }


def _neurons(model: Any) -> int:
    """F of the widest routed MLP."""
    forms = (inner_linears(mlp, model.config.hidden_size) for mlp in routed_mlps(model).values())
    return max(linears[last].in_features for linears, last in forms)
