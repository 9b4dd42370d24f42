"""The rows of each step: looked up in packed text, or taken from a stream."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dtfcli.data.order import update_indices
from dtfcli.data.prepare import TokenizedData
from dtfcli.data.stream import RowStream
from dtfcli.settings import Settings


class StepRows:
    """Rows of text that was packed before the run, in an order that is a function of seed and step.

    The rows of a step are the same whatever the number of processes, which divide them.
    """

    def __init__(self, rows: np.ndarray, rows_per_step: int, seed: int) -> None:
        """Take [N, T] rows."""
        self._rows, self._count, self._seed = rows, rows_per_step, seed

    def take(self, step: int, check: Callable[[], None]) -> np.ndarray:
        """Rows of step `step` (from 0), int32 [rows_per_step, T]; `check` may raise while text is waited for."""
        indices = update_indices(step, num_blocks=len(self._rows), blocks_per_update=self._count, seed=self._seed)
        return self._rows[indices]

    def state(self) -> dict[str, Any] | None:
        """The position after the rows taken, for a checkpoint; None: it follows from the step."""
        return None

    def close(self) -> None:
        """Stop reading."""


class StreamedRows(StepRows):
    """Rows of a stream, in its order; it is opened with the first step."""

    def __init__(self, open_stream: Callable[[dict[str, Any] | None], RowStream], count: int, state: Any) -> None:
        """Go on from `state`; None: the beginning."""
        self._open, self._count, self._state = open_stream, count, state
        self._stream: RowStream | None = None

    def take(self, step: int, check: Callable[[], None]) -> np.ndarray:
        if self._stream is None:
            self._stream = self._open(self._state)
        return self._stream.take(self._count, check)

    def state(self) -> dict[str, Any] | None:
        return self._state if self._stream is None else self._stream.state()

    def close(self) -> None:
        if self._stream is not None:
            self._state = self._stream.state()
            self._stream.close()
            self._stream = None


def step_rows(
    settings: Settings, data: TokenizedData, tokenizer: Any, count: int, state: Any, on_note: Callable[[str], None]
) -> StepRows:
    """The rows of a run's steps.

    Args:
        settings: of the run.
        data: the packed text, or the beginning of a stream.
        tokenizer: of the run.
        count: rows per step, over all processes.
        state: of the stream in the checkpoint that is resumed, or None.
        on_note: called when a source begins again.
    """
    seed = settings.run.seed
    if not settings.data.streaming:
        return StepRows(data.train, count, seed)
    return StreamedRows(
        lambda at: RowStream(settings.data, tokenizer, seed=seed, state=at, on_note=on_note), count, state
    )
