"""What a model answered so far, batch by batch, on disk: a killed evaluation goes on where it was.

A file holds one job under one set of circumstances (weights, routing, capacity, task configuration, limit, shots, batch
size, versions: all of them are hashed into its name). Batches are formed the same way every time, so what is found is
exactly what would be computed again, to the last bit. Each line is complete or ignored: a kill in the middle of
writing loses a batch.
"""

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Batch:
    """One batch that a model has answered.

    Attributes:
        answers: in the order of its requests.
        counts: what the routed layers took (`ShareMeter.counts`).
        truncated: requests that did not fit the model's positions and lost their beginning.
        seconds: it took.
    """

    answers: list[Any]
    counts: dict[str, Any]
    truncated: int
    seconds: float


@dataclass
class AnswerStore:
    """The batches of one job.

    Attributes:
        path: of the file; None: kept in memory alone.
        reused, computed: requests that were found, and that were answered anew.
    """

    path: Path | None = None
    reused: int = 0
    computed: int = 0
    _known: dict[str, Batch] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _file: IO[str] | None = None

    def __post_init__(self) -> None:
        """Read what is there."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._known[key] = Batch(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def key(self, content: Any) -> str:
        """A name for a batch; the same content asked for again within a run (repeats) gets another."""
        digest = fingerprint(content)
        self._asked[digest] += 1
        return f"{digest}-{self._asked[digest]}"

    def find(self, key: str) -> Batch | None:
        """A batch that was answered before."""
        batch = self._known.get(key)
        if batch is not None:
            self.reused += len(batch.answers)
        return batch

    def add(self, key: str, batch: Batch) -> None:
        """Write a batch down; it survives the process, though not the machine's power."""
        self.computed += len(batch.answers)
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell():
                self._file.write("\n")  # a kill may have left half a line
        self._file.write(json.dumps({"key": key, **asdict(batch)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Remove the file, and its folder with the last one: the scores are safe elsewhere."""
        self.close()
        if self.path is None:
            return
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.path.parent.rmdir()


def fingerprint(content: Any) -> str:
    """16 hex digits that name a JSON-like content; what JSON does not know counts as its text."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
