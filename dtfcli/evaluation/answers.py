"""Keeps a model's answers on disk, batch by batch, so that a killed evaluation continues.

A file holds one job under one set of circumstances: weights, routing, capacity, task configuration, limit, shots, batch
size and versions are hashed into its name. Batches are formed the same way every time, so a stored answer equals a
computed one, to the last bit. An incomplete line is ignored: a kill in the middle of writing loses one batch.
"""

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from dtfcli.errors import reading


@dataclass(frozen=True)
class AnsweredBatch:
    """One batch that a model has answered.

    Attributes:
        answers: in the order of its requests.
        counts: routed tokens (`ShareMeter.counts`).
        truncated: requests that exceeded the model's positions and lost their beginning.
    """

    answers: list[Any]
    counts: dict[str, Any]
    truncated: int
    seconds: float


@dataclass
class AnswerStore:
    """The batches of one job.

    Attributes:
        path: of the file; None: keep them in memory only.
        reused: requests with a stored answer.
    """

    path: Path | None = None
    reused: int = 0
    _known: dict[str, AnsweredBatch] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _file: IO[str] | None = None

    def __post_init__(self) -> None:
        """Read the file, if it exists."""
        if self.path is None or not self.path.exists():
            return
        with reading(self.path, "delete it"):
            content = self.path.read_text("utf-8", errors="replace")
        for line in content.splitlines():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._known[key] = TypeAdapter(AnsweredBatch).validate_json(json.dumps(record), strict=True)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue

    def key(self, content: Any) -> str:
        """A name for a batch; a repeat of the same content within a run gets another name."""
        digest = fingerprint(content)
        self._asked[digest] += 1
        return f"{digest}-{self._asked[digest]}"

    def find(self, key: str) -> AnsweredBatch | None:
        """A batch with stored answers."""
        batch = self._known.get(key)
        if batch is not None:
            self.reused += len(batch.answers)
        return batch

    def add(self, key: str, batch: AnsweredBatch) -> None:
        """Store a batch; it survives the end of the process, but not a power failure."""
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
        """Remove the file, and its folder if that is empty: the scores are safe elsewhere."""
        self.close()
        if self.path is None:
            return
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.path.parent.rmdir()


def fingerprint(content: Any) -> str:
    """16 hex digits that name JSON-like content; other values count as their text."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
