"""Measured time of a study's models next to dense: `dtf bench` on the first run of each point."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dtfcli.bench.report import BenchOptions
from dtfcli.bench.run import bench
from dtfcli.loading.load import load_model
from dtfcli.models.conversion import to_dense
from dtfcli.models.pretrained import is_routed
from dtfcli.models.stock import longest_text
from dtfcli.runs.folder import FINAL_MODEL
from dtfcli.studies.report import Timing

_NEW_TOKENS = 32


def _copy(models: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The models for `bench`, which takes the dense one out; their weights are float32 already."""
    return dict(models)


def time_models(runs: Mapping[str, Path], tell: Callable[[str], None]) -> dict[str, Timing]:
    """Prefill and decoding of routed models over their own dense backbone; nothing of one with a capacity per layer.

    Args:
        runs: a run folder of each point.
        tell: called with what is measured next.
    """
    timings: dict[str, Timing] = {}
    for name, run in runs.items():
        model: Any = load_model(run / FINAL_MODEL, device="cpu", dtype=torch.float32)
        if not is_routed(model):
            timings[name] = Timing(1.0, 1.0)
            continue
        if not isinstance(model.capacity, float):
            continue
        longest = longest_text(model.config)
        models = {"dense": to_dense(model), model.config.architecture: model}
        options = BenchOptions(
            capacities=[model.capacity],
            phases=("prefill", "decode"),
            seq_len=min(1024, (longest - _NEW_TOKENS) // 2),
            new_tokens=_NEW_TOKENS,
            repeats=5,
        )
        prefill, decode = bench(partial(_copy, models), options, tell).results
        timings[name] = Timing(prefill.time_ratio, decode.time_ratio, prefill.routed_share, decode.routed_share)
    return timings
