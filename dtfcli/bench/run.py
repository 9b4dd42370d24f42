"""All phases of a measurement, and the machine that it was taken on.

Machines are shared and their clocks drift: a ratio of medians taken alternately holds where absolute times do not.
"""

from collections.abc import Callable
from typing import Any

import torch

from dtfcli.bench.inference import bench_inference
from dtfcli.bench.report import BenchOptions, BenchReport
from dtfcli.bench.steps import bench_training
from dtfcli.cost.peak import matmul_peak
from dtfcli.errors import ConfigError
from dtfcli.loading.devices import keep_freed_memory
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM, routed_mlps
from dtfcli.models.pretrained import is_added, is_routed
from dtfcli.models.router import CAPACITY_GRID


def bench(
    models: Callable[[torch.dtype], dict[str, Any]], options: BenchOptions, note: Callable[[str], None]
) -> BenchReport:
    """Measure models that share their weights, in one process, taking turns.

    Args:
        models: makes them with weights of a dtype, "dense" among them; float32 for training, which autocasts.
        options: what to measure.
        note: called with the name of the next measurement.
    """
    training = []
    if "train" in options.phases:
        routed = _with_kernels(models(torch.float32), options)
        if routed["dense"].device.type == "cpu":
            keep_freed_memory()  # as `dtf train` does
        _calibrate({name: model for name, model in routed.items() if isinstance(model, RoutedCausalLM)}, options)
        training = bench_training(routed.pop("dense"), routed, options, note)
    routed = _with_kernels(models(options.dtype), options)
    dense = routed.pop("dense")
    if options.inference_phases:
        note(f"calibrating {', '.join(routed)} on {options.calibration_tokens} random tokens")
        _calibrate(routed, options)
    return BenchReport(
        device=str(dense.device),
        dtype=str(dense.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        batch=options.batch,
        seq_len=options.seq_len,
        new_tokens=options.new_tokens,
        static=options.static,
        triton=options.triton,
        matmul_gflops=(matmul_peak(dense.device, dense.dtype) or 0.0) / 1e9,
        results=bench_inference(dense, routed, options, note),
        training=training,
    )


def _with_kernels(models: dict[str, Any], options: BenchOptions) -> dict[str, Any]:
    """The same models, the routed ones with or without our kernels."""
    for model in models.values():
        if isinstance(model, RoutedCausalLM):
            if options.static:
                raise ConfigError("--static: decoding in fixed shapes is for routed blocks, not for routed MLPs.")
        elif is_routed(model):
            model.model.use_triton_kernels(options.triton)
    return models


def _calibrate(routed: dict[str, Any], options: BenchOptions) -> None:
    """Measure the thresholds of random models, or again those of trained ones, on random tokens.

    Scores change with the position: rows twice as long have the decoded tokens in their middle.
    """
    length = 2 * options.seq_len + options.new_tokens if "decode" in options.phases else options.seq_len
    length = min(length, options.calibration_tokens)
    rows = max(1, options.calibration_tokens // length)
    grid = [share for share in CAPACITY_GRID if share in options.capacities]
    capacities = grid if len(grid) == len(options.capacities) else None
    for model in routed.values():
        seed = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=seed)
        if isinstance(model, RoutedCausalLM) and not model.is_fitted:
            for name, parameter in model.named_parameters():
                if is_added(name):
                    torch.nn.init.normal_(parameter, std=0.02)
            for mlp in routed_mlps(model).values():
                mlp.router.keep(torch.zeros_like(mlp.router.shares))
        model.calibrate([{"input_ids": row.unsqueeze(0)} for row in ids], capacities=capacities)
