"""The reports of a run: events while it goes on, and its tokens per second."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal["phase", "start", "step", "evaluation", "checkpoint", "warning", "end"]


@dataclass(frozen=True)
class TrainEvent:
    """Something that happened in a run.

    Attributes:
        kind: phase (a stage without steps began or went on, `fraction` done), start (training begins), step (an
            step is done; `metrics` on logging steps), evaluation (`metrics`), checkpoint, warning, end.
        message: for people.
        step, total_steps: how many steps the run has made, and how many it will make.
        fraction: of a phase, where known.
        metrics: as in metrics.jsonl.
    """

    kind: EventKind
    message: str = ""
    step: int = 0
    total_steps: int = 0
    fraction: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


TrainListener = Callable[[TrainEvent], None]


class PhaseTimes:
    """A listener that notes how long each phase takes, and passes events on.

    Attributes:
        seconds: by the phase's message; "Starting" is the time before the first phase.
    """

    def __init__(self, listener: TrainListener) -> None:
        self.listener, self.seconds = listener, dict[str, float]()
        self._phase, self._since = "Starting", time.perf_counter()

    def __call__(self, event: TrainEvent) -> None:
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        if event.kind == "phase":
            self._phase = event.message
        self.listener(event)


class Stopwatch:
    """Tokens per second of training alone: without evaluations, checkpoints and the first step (warm-up)."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._warm = 0.0, 0, False

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, tokens: int) -> None:
        if self._warm:
            self.seconds += time.perf_counter() - self._began
            self.tokens += tokens
        self._warm = True

    def take_rate(self) -> float | None:
        """Tokens per second since the last call; None: of the first step alone."""
        rate = self.tokens / self.seconds if self.tokens else None
        self.seconds, self.tokens = 0.0, 0
        return rate
