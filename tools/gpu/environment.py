"""The machine: what it is, and the speeds that everything else is measured against."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tools.gpu.job import Job

PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft", "numpy", "liger_kernel", "flash_attn")


def run(job: Job) -> None:
    """Describe the machine, then measure it."""
    device = job.device()
    job.write(machine=describe(device), versions=versions())
    job.write(matmul=measure_matmul(device), copy=measure_copy(device))
    job.write(latency=measure_latency(device))


def versions() -> dict[str, str | None]:
    """Of Python and the packages; None for those that are not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Names and sizes of the processors."""
    found: dict[str, Any] = {"device": str(device), "cpu": _cpu_name(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
        }
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of some work: by the device's own events on a GPU, by the clock elsewhere."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize(device)
    return 1e-3 * statistics.median(before.elapsed_time(after) for before, after in events)


def measure_matmul(device: torch.device) -> list[dict[str, Any]]:
    """TFLOP/s of bfloat16 products [m, k] @ [k, n] of random numbers: squares, and Qwen2.5-0.5B's MLP for some rows."""
    squares = [(n, n, n) for n in ((4096, 8192, 16384) if device.type == "cuda" else (256, 512))]
    rows = (1, 64, 1024, 8192) if device.type == "cuda" else (1, 64)
    found = []
    for m, k, n in [*squares, *((row, 896, 4864) for row in rows)]:
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        seconds = seconds_of(lambda left=left, right=right: left @ right, device)  # type: ignore[misc]
        found.append({"m": m, "k": k, "n": n, "us": 1e6 * seconds, "tflops": 2 * m * k * n / seconds / 1e12})
    return found


def measure_copy(device: torch.device) -> dict[str, float]:
    """GB/s of a copy on the device, bytes read and written both counted."""
    size = 2**32 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    return {"bytes": size, "gb_per_second": 2 * size / seconds / 1e9}


def measure_latency(device: torch.device, count: int = 1000) -> dict[str, float | None]:
    """Microseconds of a tiny operation, of one in a replayed graph, and of one whose result the host waits for."""
    count = count if device.type == "cuda" else 200
    one = torch.zeros((), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def each(work: Callable[[], Any]) -> float:
        for _ in range(20):
            work()
        wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        return 1e6 * (time.perf_counter() - began) / count

    launch = each(lambda: one.add_(1.0))
    launch_and_item = each(lambda: one.add_(1.0).item())
    return {
        "launch_us": launch,
        "launch_in_graph_us": _launch_in_graph(one, wait) if device.type == "cuda" else None,
        "launch_and_item_us": launch_and_item,
        "item_us": launch_and_item - launch,
    }


def _launch_in_graph(one: torch.Tensor, wait: Callable[[], None], launches: int = 200, replays: int = 20) -> float:
    """Microseconds of each of many launches in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            one.add_(1.0)
    graph.replay()
    wait()
    began = time.perf_counter()
    for _ in range(replays):
        graph.replay()
    wait()
    return 1e6 * (time.perf_counter() - began) / (launches * replays)
