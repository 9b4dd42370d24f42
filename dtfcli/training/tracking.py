"""What a run reports: events for whoever is watching, metrics.jsonl for later, and how fast the machine was used."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dtfcli.training.checkpoint import explained_write_errors

EventKind = Literal["phase", "start", "step", "evaluation", "checkpoint", "warning", "end"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: phase (a stage without steps began or went on, `fraction` done), start (training begins), step (an
            update is done; `metrics` on logging steps), evaluation (`metrics`), checkpoint, warning, end.
        message: for people.
        step, total_steps: updates done and to do.
        fraction: of a phase, where known.
        metrics: as in metrics.jsonl.
    """

    kind: EventKind
    message: str = ""
    step: int = 0
    total_steps: int = 0
    fraction: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


Listener = Callable[[Event], None]


class MetricsLog:
    """Appends lines to metrics.jsonl, each whole and flushed."""

    def __init__(
        self,
        path: Path,
        keep_bytes: int = 0,
        writes: bool = True,
        on_line: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Open the log; what lies beyond `keep_bytes` was written after the checkpoint being resumed, and goes.

        Without `writes`, in a process that is not the main one, nothing is opened or written. `on_line` gets every
        line too.
        """
        self.path, self.writes, self._on_line = path, writes, on_line
        if not writes:
            return
        with explained_write_errors(path.parent):
            path.touch()
            os.truncate(path, min(keep_bytes, path.stat().st_size))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line."""
        if not self.writes:
            return
        with explained_write_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._on_line(metrics)

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.writes else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Stopwatch:
    """Tokens per second of training alone: evaluations and checkpoints are paused for."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, tokens: int) -> None:
        self.seconds += time.perf_counter() - self._began
        self.tokens += tokens

    def take_rate(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / max(self.seconds, 1e-9)
        self.seconds, self.tokens = 0.0, 0
        return rate


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a square matrix product reaches here, the best of a few: what `mfu` is measured against.

    Returns:
        FLOP/s; None where products of this type do not run on the device.
    """
    size, repeats = (1024, 5) if device.type == "cpu" else (8192, 10)
    try:
        left = torch.ones(size, size, device=device, dtype=dtype)
        best = 0.0
        for _ in range(repeats):
            _synchronize(device)
            began = time.perf_counter()
            left @ left
            _synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    except RuntimeError:
        return None
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
