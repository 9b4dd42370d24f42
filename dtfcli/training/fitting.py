"""Forecasts and predicted costs, fitted by least squares to training text before the first step."""

from typing import Any

import torch

from dtfcli.data.documents import OnProgress
from dtfcli.loading.devices import compute_dtype
from dtfcli.settings import Settings
from dtfcli.training.validation import calibration_batches

_TOKENS_PER_UNIT = 32
"""Of text, for each unit of the hidden size."""


def fit_routing(settings: Settings, model: Any, rows: Any, device: torch.device, on_progress: OnProgress) -> None:
    """Fit what a converted model's skipping tokens need; a model that was routed before only if settings say so.

    Args:
        settings: of the run.
        model: as it was built.
        rows: training text, int32 [N, T].
        device: that computes.
        on_progress: called with the phase and the finished share of it.
    """
    tokens = settings.training.fit_tokens
    if tokens is None and model.is_fitted:
        return
    if tokens is None:
        tokens = _TOKENS_PER_UNIT * model.config.hidden_size
    if not (tokens and settings.model.base and model.config.learns_from_updates):
        return
    batches = calibration_batches(rows, tokens, settings.training.micro_batch_size, settings.run.seed)
    dtype = compute_dtype(settings.run.dtype, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        model.fit_routing(
            batches, lambda layer, layers: on_progress("Fitting forecasts and predicted costs", layer / layers), device
        )
