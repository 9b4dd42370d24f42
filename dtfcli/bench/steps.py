"""Time and memory of a training step of routed models against their own dense backbone, in one process and in turns.

The step is that of `dtf train`: float32 weights, autocast, the losses of `Objective`. The notable choices:

- forward and backward are timed together, the optimizer's step apart: it costs dense and routed models the same;
- next to the wall clock stands the ratio of processor time (CPU only): on a shared machine it is the steadier one;
- the peak is the most that the process (CPU) or the allocator (GPU) held while a step ran, the weights included;
- "stock" is the dense model as Transformers trains it, with whole logits.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtfcli.bench.report import BenchOptions, StepResult
from dtfcli.cost.accounting import training_step_flops
from dtfcli.cost.peak import matmul_peak, reset_resident_peak, resident, synchronize
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.pretrained import is_routed
from dtfcli.settings.training import TrainingSettings
from dtfcli.shares import measured_shares
from dtfcli.training.compiling import compile_layers
from dtfcli.training.liger import check_liger, use_liger
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import GROUPS, build_optimizer


class _Loss(nn.Module):
    """The loss as `dtf train` computes it, or as Transformers does (stock)."""

    def __init__(self, model: Any, *, stock: bool = False) -> None:
        super().__init__()
        self.module = model if stock else Objective(model)
        self.stock = stock

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.stock:
            return self.module(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return self.module(input_ids, input_ids[:, 1:].numel()).loss


@dataclass
class _Entry:
    """A model at a capacity, and its measurements."""

    architecture: str
    capacity: float
    model: Any
    objective: nn.Module
    flops: float = 0.0  # of a training step, for each token
    peak_bytes: int | None = None
    optimizer_seconds: float = 0.0
    rounds: list[dict[str, float]] = field(default_factory=list)  # seconds by name

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(times[name] for times in self.rounds)

    def ratio_to(self, other: "_Entry", clock: str) -> float:
        """Median over the rounds of this step's time over the other's."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine[clock] / its[clock] for mine, its in pairs)


def bench_training(
    dense: PreTrainedModel, routed: dict[str, PreTrainedModel], options: BenchOptions, note: Callable[[str], None]
) -> list[StepResult]:
    """Measure training steps in rounds: each round takes one step of every model.

    Args:
        dense: the backbone, float32; left in train mode, without gradients.
        routed: architecture → model that shares its weights. Their training capacity is changed.
        options: what to measure.
        note: called with the name of the next measurement.
    """
    input_ids = options.random_ids(dense.config.vocab_size, options.seq_len).to(dense.device)
    entries = [_Entry("dense", 1.0, dense, _Loss(dense))]
    if options.stock:
        entries.append(_Entry("stock", 1.0, dense, _Loss(dense, stock=True)))
    for architecture, model in routed.items():
        entries += [_Entry(architecture, share, model, _Loss(model)) for share in options.capacities]
    check_liger(options.kernels, dense.device)
    for model in (dense, *routed.values()):
        if options.kernels == "liger" and (left := use_liger(model)):
            note(f"torch runs {', '.join(left)}, for which Liger has no kernel")
        if options.compiled:
            compile_layers(model)

    for entry in entries:
        note(f"train, {entry.architecture} at γ {entry.capacity:g}: memory and optimizer")
        _measure_once(entry, input_ids, options)
    for number in range(-1, options.repeats):  # measuring the peaks gave all memory back: a round to take it again
        note(f"train, round {number + 1} of {options.repeats}" if number >= 0 else "train, a round of warm-up")
        for entry in entries:
            _choose_capacity(entry.model, entry.capacity)
            times = _timed_step(entry.objective, input_ids, options.dtype)
            if number >= 0:
                entry.rounds.append(times)
    dense.zero_grad(set_to_none=True)
    peak = matmul_peak(dense.device, options.dtype)
    on_cpu = dense.device.type == "cpu"
    return [_result(entry, entries[0], input_ids.numel(), peak, on_cpu) for entry in entries]


def _measure_once(entry: _Entry, input_ids: Tensor, options: BenchOptions) -> None:
    """FLOPs, peak memory and the optimizer's time of one model."""
    _choose_capacity(entry.model, entry.capacity)
    shares = None
    if isinstance(entry.model, RoutedCausalLM):  # of random weights another share enters than γ, in training, too
        with measured_shares(entry.model) as meter, torch.no_grad():
            entry.model(input_ids, logits_to_keep=1)
        shares = meter.read().by_layer
    entry.flops = training_step_flops(entry.model.train(), options.seq_len, shares)
    if options.compiled:
        _timed_step(entry.objective, input_ids, options.dtype)
    entry.peak_bytes = _peak_bytes(partial(_timed_step, entry.objective, input_ids, options.dtype), entry.objective)
    entry.optimizer_seconds = _optimizer_seconds(entry.objective)


def _result(entry: _Entry, dense: _Entry, tokens: int, peak_flops: float | None, on_cpu: bool) -> StepResult:
    seconds = entry.median("wall")
    return StepResult(
        architecture=entry.architecture,
        capacity=entry.capacity,
        forward_ms=1e3 * entry.median("forward"),
        backward_ms=1e3 * entry.median("backward"),
        step_ms=1e3 * seconds,
        optimizer_ms=1e3 * entry.optimizer_seconds,
        time_ratio=entry.ratio_to(dense, "wall"),
        cpu_ratio=entry.ratio_to(dense, "cpu") if on_cpu else None,
        flop_ratio=entry.flops / dense.flops,
        peak_bytes=entry.peak_bytes,
        tokens_per_second=tokens / seconds,
        utilization=entry.flops * tokens / seconds / peak_flops if peak_flops else None,
    )


def _choose_capacity(model: Any, capacity: float) -> None:
    """The γ that training routes at; nothing for dense models."""
    if is_routed(model):
        model.config.capacity = capacity
        if isinstance(model, RoutedCausalLM):
            model.set_routing()


def _timed_step(objective: nn.Module, input_ids: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the forward and the backward pass of a step."""
    device = input_ids.device
    objective.train()
    objective.zero_grad(set_to_none=True)
    synchronize(device)
    began_cpu, began = time.process_time(), time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(input_ids)
    synchronize(device)
    between = time.perf_counter()
    loss.backward()
    synchronize(device)
    end = time.perf_counter()
    times = {"forward": between - began, "backward": end - between, "wall": end - began}
    return times | {"cpu": time.process_time() - began_cpu}


def _optimizer_seconds(objective: nn.Module, repeats: int = 3) -> float:
    """Median of AdamW steps on the gradients at hand, at a rate of 0: the weights stay as they are."""
    still = TrainingSettings.model_validate({"learning_rates": dict.fromkeys(GROUPS, 0.0)})
    optimizer = build_optimizer(objective, still)
    device = next(objective.parameters()).device
    optimizer.step()  # makes the moments
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _peak_bytes(step: Callable[[], Any], objective: nn.Module) -> int | None:
    """Most bytes held while a step runs: its weights, and all that it adds."""
    parameters = list(objective.parameters())
    for parameter in parameters:
        parameter.grad = None
    weights = sum(parameter.nbytes for parameter in parameters)
    device = parameters[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not reset_resident_peak():
        return None
    before = resident("VmRSS")
    step()
    return weights + resident("VmHWM") - before
