"""Ctrl-C and SIGTERM: the first asks the run to stop at a safe place, a Ctrl-C after it stops it at once.

A second SIGTERM does not: schedulers send it to all processes, and a launcher then passes its own on. SIGUSR2 is a
scheduler's warning that time runs out (Slurm's `--signal`), and counts as SIGTERM.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name)]


class StopRequested(Exception):
    """The run should save and end; raised between batches."""


class StopSignal:
    """Catches `STOP_SIGNALS` inside a `with` block, in the main thread; elsewhere it never asks to stop."""

    def __init__(self, on_request: Callable[[], Any]) -> None:
        self.requested = False
        self.agree: Callable[[bool], bool] = bool
        """Whether any process of the run was asked; all of them call it at the same places."""
        self._on_request = on_request
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        # The signal may have come in the middle of a write to the same stream, which cannot be entered twice.
        with contextlib.suppress(RuntimeError):
            self._on_request()

    def check(self) -> None:
        """Raise `StopRequested` when a signal has come to any process."""
        if self.agree(self.requested):
            raise StopRequested

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item
