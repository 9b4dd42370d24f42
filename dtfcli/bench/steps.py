"""Time and memory of a training step of routed models against their own dense backbone, in one process and in turns.

What is measured is what `dtf train` runs: float32 weights, autocast, the losses of `Objective`. The notable choices:

- forward and backward are timed together, the optimizer's step apart: it costs dense and routed models the same;
- next to the wall clock stands the ratio of processor time (CPU only): on a shared machine it is the steadier one;
- the peak is what the process (CPU) or the allocator (GPU) held at most while a step ran, the weights included;
- "stock" is the dense model as Transformers trains it, with whole logits.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtfcli.cost.accounting import training_step_flops
from dtfcli.cost.peak import matmul_peak
from dtfcli.training.compiling import compile_layers
from dtfcli.training.kernels import check_kernels, use_liger
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import GROUPS, build_optimizer, parameter_groups

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class StepResult:
    """A training step of one model, next to dense.

    Attributes:
        architecture: "dense", "stock", "dtf" or "mod".
        capacity: γ; 1 for dense models.
        forward_ms, backward_ms, step_ms: medians; step_ms is both together, without the optimizer.
        optimizer_ms: of an AdamW step over all parameters.
        time_ratio: median of this model's step over dense's, over the rounds.
        cpu_ratio: the same in processor time; None on other devices.
        flop_ratio: FLOPs over those of dense.
        peak_bytes: most memory held during a step, weights included; None where the system does not say.
        tokens_per_second: in steps without the optimizer.
        utilization: FLOP/s over the measured peak of a matrix product; None where that could not be measured.
    """

    architecture: str
    capacity: float
    forward_ms: float
    backward_ms: float
    step_ms: float
    optimizer_ms: float
    time_ratio: float
    cpu_ratio: float | None
    flop_ratio: float
    peak_bytes: int | None
    tokens_per_second: float
    utilization: float | None


class _StockObjective(nn.Module):
    """The loss as Transformers computes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


class _OwnObjective(nn.Module):
    """The loss as `dtf train` computes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.objective = Objective(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.objective(input_ids, input_ids[:, 1:].numel()).loss


def bench_training(
    dense: PreTrainedModel,
    routed: dict[str, PreTrainedModel],
    *,
    capacities: Sequence[float],
    dtype: torch.dtype,
    seq_len: int = 512,
    batch: int = 1,
    repeats: int = 7,
    stock: bool = False,
    compiled: bool = False,
    kernels: str = "torch",
    micro_batches: int = 1,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[StepResult]:
    """Measure training steps in rounds: each round takes one step of every model.

    Args:
        dense: the backbone, float32; left in train mode, without gradients.
        routed: architecture → model that shares its weights. Their training capacity is changed.
        capacities: γ to measure at.
        dtype: of the autocast; float32: none.
        seq_len: tokens of a row.
        batch: rows.
        repeats: rounds, after one of warm-up.
        stock: also measure the dense model as Transformers trains it.
        compiled: compile layers, as `training.compile` does.
        kernels: of norms and SwiGLU, as `training.kernels`; also those of "stock".
        micro_batches: of an update; a step is the mean of one. Weights are converted to `dtype` once for all of them.
        seed: of the token ids.
        on_progress: called with what is measured next.
    """
    tell = on_progress or (lambda message: None)
    device = dense.device
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, dense.config.vocab_size, (batch, seq_len), generator=generator).to(device)
    entries: list[tuple[str, float, Any, nn.Module]] = [("dense", 1.0, dense, _OwnObjective(dense))]
    if stock:
        entries.append(("stock", 1.0, dense, _StockObjective(dense)))
    for architecture, model in routed.items():
        entries += [(architecture, capacity, model, _OwnObjective(model)) for capacity in capacities]
    check_kernels(kernels, device)
    for model in (dense, *routed.values()):
        if kernels == "liger":
            use_liger(model)
        if compiled:
            compile_layers(model)

    flops, rounds, peaks, optimizers = [], [], [], []
    for architecture, capacity, model, objective in entries:
        tell(f"train, {architecture} at γ {capacity:g}: memory and optimizer")
        _choose_capacity(model, capacity)
        flops.append(training_step_flops(model.train(), seq_len))
        if compiled:
            _timed_step(objective, input_ids, dtype)
        peaks.append(_peak_bytes(partial(_timed_step, objective, input_ids, dtype), objective))
        optimizers.append(_optimizer_seconds(objective))
    for number in range(-1, repeats):  # measuring the peaks has given all memory back: one round to take it again
        tell(f"train, round {number + 1} of {repeats}" if number >= 0 else "train, a round of warm-up")
        times = []
        for _, capacity, model, objective in entries:
            _choose_capacity(model, capacity)
            times.append(_timed_step(objective, input_ids, dtype, micro_batches))
        if number >= 0:
            rounds.append(times)
    dense.zero_grad(set_to_none=True)
    peak_flops = matmul_peak(device, dtype)
    results = []
    for index, (architecture, capacity, _, _) in enumerate(entries):
        forward, backward, step = (
            statistics.median(times[index][part] for times in rounds) for part in ("forward", "backward", "wall")
        )
        results.append(
            StepResult(
                architecture=architecture,
                capacity=capacity,
                forward_ms=1e3 * forward,
                backward_ms=1e3 * backward,
                step_ms=1e3 * step,
                optimizer_ms=1e3 * optimizers[index],
                time_ratio=_ratio(rounds, index, "wall"),
                cpu_ratio=_ratio(rounds, index, "cpu") if device.type == "cpu" else None,
                flop_ratio=flops[index] / flops[0],
                peak_bytes=peaks[index],
                tokens_per_second=batch * seq_len / step,
                utilization=flops[index] * batch * seq_len / step / peak_flops if peak_flops else None,
            )
        )
    return results


def _ratio(rounds: list[list[dict[str, float]]], index: int, clock: str) -> float:
    return statistics.median(times[index][clock] / times[0][clock] for times in rounds)


def _choose_capacity(model: Any, capacity: float) -> None:
    """The γ that training routes at; nothing for dense models."""
    if hasattr(model, "set_routing"):
        model.config.capacity = capacity


def _timed_step(
    objective: nn.Module, input_ids: Tensor, dtype: torch.dtype, micro_batches: int = 1
) -> dict[str, float]:
    """Seconds of a forward and a backward pass, the mean over the micro-batches of an update that starts afresh."""
    device = input_ids.device
    objective.train()
    objective.zero_grad(set_to_none=True)
    forward = backward = 0.0
    _wait(device)
    began_cpu = time.process_time()
    # As in `training.loop.update`: one autocast around all micro-batches, none around their backward passes.
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(micro_batches):
            began = time.perf_counter()
            loss = objective(input_ids)
            _wait(device)
            between = time.perf_counter()
            with torch.autocast(device.type, enabled=False):
                loss.backward()
            _wait(device)
            forward += between - began
            backward += time.perf_counter() - between
    parts = {"forward": forward, "backward": backward, "wall": forward + backward}
    parts["cpu"] = time.process_time() - began_cpu
    return {name: seconds / micro_batches for name, seconds in parts.items()}


def _optimizer_seconds(objective: nn.Module, repeats: int = 3) -> float:
    """Median of AdamW steps on the gradients at hand, at a rate of 0: the weights stay as they are."""
    groups = parameter_groups(objective.named_parameters(), dict.fromkeys(GROUPS, 0.0), weight_decay=0.01)
    optimizer = build_optimizer(groups, (0.9, 0.95))
    device = next(objective.parameters()).device
    optimizer.step()  # makes the moments
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        optimizer.step()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _peak_bytes(step: Callable[[], Any], objective: nn.Module) -> int | None:
    """Most bytes held while a step runs: its weights, and what is added to what was there before."""
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
    if device.type != "cpu" or not _reset_resident_peak():
        return None
    before = _resident("VmRSS")
    step()
    return weights + _resident("VmHWM") - before


def _reset_resident_peak() -> bool:
    """Give freed memory back, then let the kernel count the peak from here; False where it cannot (not Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return os.path.exists("/proc/self/status")


def _resident(field: str) -> int:
    """A field of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
