"""A run in progress: everything that belongs to it, and where it stands."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from dtfcli.data.prepare import TokenizedData
from dtfcli.runs.files import MetricsLog
from dtfcli.settings import Settings
from dtfcli.training.distributed import Processes, Replicated
from dtfcli.training.events import Stopwatch, TrainEvent, TrainListener
from dtfcli.training.interrupt import StopSignal
from dtfcli.training.plan import TrainPlan
from dtfcli.training.rows import StepRows
from dtfcli.training.trackers import Trackers


@dataclass
class TrainingState:
    """Where a run stands, apart from tensors and random generators.

    Attributes:
        step: how many were made.
        evaluated_step: the last step whose evaluation is in the metrics; -1: none.
        best_step, best_loss: of the best evaluation after the start; -1 and None: none yet.
        metrics_bytes: length of metrics.jsonl at this point.
        data: fingerprint of the tokenized data.
        processes: their number. A run resumed with another number continues from the same weights, but not bit for bit.
        stream: position in sources that stream (`stream.RowStream.state`); None: none do.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    metrics_bytes: int = 0
    data: str = ""
    processes: int = 1
    stream: dict[str, Any] | None = None


@dataclass
class Run:
    """Everything that a running run needs."""

    settings: Settings
    plan: TrainPlan
    folder: Path
    accelerator: Accelerator
    processes: Processes
    states: Replicated
    objective: Any
    model: Any
    optimizer: Any
    tokenizer: Any
    data: TokenizedData
    validation: np.ndarray
    """int32 [N, T]: the rows of every evaluation; none without held-out text."""
    rows: StepRows
    trackers: Trackers
    log: MetricsLog
    state: TrainingState
    emit: TrainListener
    stop: StopSignal
    peak_flops: float | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    curves_drawn_at: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.state.step * self.plan.tokens_per_step

    def report(
        self, kind: Any, message: str = "", fraction: float | None = None, metrics: dict[str, Any] | None = None
    ) -> None:
        """Emit an event of this step."""
        self.emit(TrainEvent(kind, message, self.state.step, self.plan.total_steps, fraction, metrics or {}))
