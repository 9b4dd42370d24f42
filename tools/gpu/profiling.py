"""What one training step and one decoded token do: kernels, launches and waits of the host, dense beside dtf.

Times come from runs without the profiler, counts from one with it. On a GPU torch's sync debug mode also says which
line of the code waits for the device.
"""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dtfcli.models.cache import CACHE_NAME
from dtfcli.training.objectives import Objective
from tools.gpu.bench import Models
from tools.gpu.job import Job

ROOT = Path(__file__).parents[2]
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""cudaDeviceSynchronize is not among them: it is the measurement's own."""
WAITING_OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
TOP = 15
NAME = 80
"""Characters of a kernel's name: templates go on for hundreds."""


def run(job: Job) -> None:
    """Profile both models in both phases, one after the other, as far as the time goes."""
    models = Models(job.device(), job.rehearse)
    profiles: list[dict[str, Any]] = []
    batch, length = (2, 64) if job.rehearse else (8, 1024)
    job.write(shape="0.5B", batch=batch, seq_len=length, profiles=profiles)
    for phase, prepare, dtype in (("train", training_step, torch.float32), ("decode", decoded_token, torch.bfloat16)):
        built = models.get("0.5B", dtype)
        for name in ("dense", "dtf"):
            job.check()
            try:
                work = prepare(built[name], batch if phase == "train" else 1, length)
                profiles.append({"phase": phase, "model": name, **profiled(work, models.device)})
            except Exception:
                job.failed(f"{phase}, {name}")
            job.write()
        del built
        models.give_back()


def training_step(model: Any, batch: int, length: int) -> Callable[[], Any]:
    """Forward and backward as `dtf train` runs them: float32 weights, bfloat16 autocast, the chunked loss."""
    objective = Objective(model.train())
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    targets = ids[:, 1:].numel()

    def step() -> None:
        objective.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(ids, targets).loss
        loss.backward()

    return step


def decoded_token(model: Any, batch: int, length: int) -> Callable[[], Any]:
    """One token after a prompt, by thresholds; the cache is cropped afterward, so that every call does the same."""
    model.eval()
    ids = torch.randint(0, model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    if hasattr(model, "set_routing"):
        model.calibrate([{"input_ids": ids}], capacities=[0.5])
        model.set_routing("threshold", 0.5)
    ids = ids.to(model.device)
    with torch.inference_mode():
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1)[CACHE_NAME]

    @torch.inference_mode()
    def token() -> None:
        model(ids[:, -1:], **{CACHE_NAME: cache})
        cache.crop(-1)

    return token


def profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Wall time and counts of some work."""
    seconds = _wall_seconds(work, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        work()
        _wait(device)
    return {
        "wall_ms": 1e3 * seconds,
        **counted(recorded.key_averages(), device.type),
        "waits_at": waits_at(work, device),
    }


def _wall_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 3) -> float:
    times = []
    for number in range(-warmup, repeats):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        if number >= 0:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def counted(rows: Any, device_type: str) -> dict[str, Any]:
    """Launches, waits and the largest entries of a profile.

    Args:
        rows: averages by name, as `key_averages` gives them.
        device_type: cuda, or cpu where operations stand for kernels.
    """
    on_device = device_type != "cpu"
    counts = Counter[str]()
    for row in rows:
        counts[row.key] += row.count
    work = [row for row in rows if (row.device_type.name != "CPU") == on_device and not row.is_user_annotation]
    own = {id(row): row.self_device_time_total if on_device else row.self_cpu_time_total for row in work}
    copies = sum(count for name, count in counts.items() if "memcpy" in name.lower() and "dtoh" in name.lower())
    top = sorted(work, key=lambda row: own[id(row)], reverse=True)[:TOP]
    return {
        "kernels": sum(row.count for row in work if not row.key.startswith(("Memcpy", "Memset"))),
        "launches": sum(counts[name] for name in LAUNCHES),
        "waits": sum(counts[name] for name in WAITS),
        "copies_to_host": copies,
        "waiting_operations": {name: counts[name] for name in WAITING_OPERATIONS if counts[name]},
        "device_ms": 1e-3 * sum(own.values()),
        "top": [{"name": row.key[:NAME], "count": row.count, "ms": 1e-3 * own[id(row)]} for row in top],
    }


def waits_at(work: Callable[[], Any], device: torch.device) -> dict[str, int] | None:
    """How often each line waits for the device, by torch's sync debug mode; None where there is none to wait for."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(_place(warning) for warning in caught if "synchroniz" in str(warning.message))
    return dict(lines.most_common(30))


def _place(warning: warnings.WarningMessage) -> str:
    path = Path(warning.filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{name}:{warning.lineno}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
