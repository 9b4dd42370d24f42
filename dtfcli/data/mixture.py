"""Documents without end, drawn from several sources by weight, with a position that can be returned to.

Notable choices:

- A source is read shard by shard, in another order on each pass, and shuffled in windows: that many documents are read,
  permuted and given out before the next ones are read. A buffer that is refilled one by one would mix a little better,
  but its content would have to be saved; a window is read again from where it began.
- Which source the k-th document comes from depends on the seed and k alone.
- Documents are held out by a hash of their content: a copy elsewhere is held out too, on every pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dtfcli.data.documents import Document, hashed_share, kept_document, no_document
from dtfcli.data.order import frozen_generator
from dtfcli.data.sources import Shard, SourceReader
from dtfcli.settings.data import Source

WINDOW_CHARACTERS = 2**24
"""A window ends here too: books are larger than tweets."""


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation text."""
    return fraction > 0 and hashed_share(document.digest, seed, "split") < fraction


def draw_weights(sources: Sequence[Source]) -> list[float]:
    """How often each source is drawn from: its weight, else its ratio."""
    return [source.ratio if source.weight is None else source.weight for source in sources]


class SourceStream:
    """The documents of one source, pass after pass."""

    def __init__(
        self,
        index: int,
        reader: SourceReader,
        *,
        seed: int,
        window: int,
        wanted: Callable[[Document], bool],
        passes: int | None = None,
        on_pass: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Begin at the beginning.

        Args:
            index: position in `data.sources`.
            reader: the opened source.
            seed: of the order of shards and documents.
            window: documents that are shuffled together.
            wanted: the documents to give.
            passes: how often the source is read; None: without end.
            on_pass: called with the number of each pass at its end.
        """
        self._index, self._reader, self._seed, self._size = index, reader, seed, window
        self._wanted, self._passes, self._on_pass = wanted, passes, on_pass
        self._begin: dict[str, Any] = {"pass": 0, "window": 0, "shard": 0, "row": None}
        self._end = self._begin
        self._documents: list[Document] = []
        self._given = 0
        self._shard: Shard | None = None
        self._report = reader.new_report()

    def state(self) -> dict[str, Any]:
        """Where the present window begins, and how many of its documents have been given."""
        return {**self._begin, "given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._end = {key: value for key, value in state.items() if key != "given"}
        self._shard = None
        self._documents, self._given = [], 0
        if state["given"]:
            self._fill()
            self._given = state["given"]
        else:
            self._begin = self._end

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        """The next document.

        Raises:
            StopIteration: all passes are done.
            DataError: the source cannot be read, or a pass gave nothing.
        """
        while self._given == len(self._documents):
            if self._end["pass"] == self._passes:
                raise StopIteration
            self._fill()
        self._given += 1
        return self._documents[self._given - 1]

    def _fill(self) -> None:
        """Read the next window, and permute it."""
        self._begin, self._given = self._end, 0
        number, place, row = self._begin["pass"], self._begin["shard"], self._begin["row"]
        order = frozen_generator(json.dumps([self._seed, self._index, number, "shards"])).permutation(
            self._reader.num_shards
        )
        accepted: list[Document] = []
        characters = 0
        while place < len(order) and len(accepted) < self._size and characters < WINDOW_CHARACTERS:
            if self._shard is None:
                self._shard = self._reader.open_shard(int(order[place]), row, self._report)
            value = next(self._shard, self)
            if value is self:
                place, row, self._shard = place + 1, None, None
                continue
            row = self._shard.state()
            document = kept_document(self._index, self._reader, value, self._report, self._seed)
            if document is None:
                continue
            self._report.documents += 1
            if self._wanted(document):
                accepted.append(document)
                characters += len(document.text)
        window = self._begin["window"] + 1
        self._end = {"pass": number, "window": window, "shard": place, "row": row}
        if place == len(order):
            if not self._report.documents or (not accepted and window == 1 and self._passes is None):
                raise no_document(self._reader, self._report)
            self._end = {"pass": number + 1, "window": 0, "shard": 0, "row": None}
            self._on_pass(number + 1)
        mixed = frozen_generator(json.dumps([self._seed, self._index, number, window, "documents"])).permutation(
            len(accepted)
        )
        self._documents = [accepted[i] for i in mixed]


class Mixture:
    """Documents of several streams, each drawn with its weight's probability; one that ended is left out."""

    def __init__(self, streams: Sequence[SourceStream], weights: Sequence[float], seed: int) -> None:
        """Begin at the first draw."""
        self._streams, self._weights, self._seed = list(streams), np.array(weights, dtype=np.float64), seed
        self._draws = 0

    def state(self) -> dict[str, Any]:
        """The number of draws, and the state of every stream; plain JSON."""
        return {"draws": self._draws, "sources": [stream.state() for stream in self._streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._draws = state["draws"]
        for stream, saved in zip(self._streams, state["sources"], strict=True):
            stream.restore(saved)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        """The next document; StopIteration when all streams have ended."""
        while self._weights.any():
            bounds = np.cumsum(self._weights)
            place = frozen_generator(json.dumps([self._seed, self._draws, "draw"])).random_sample() * bounds[-1]
            self._draws += 1
            chosen = int(np.searchsorted(bounds, place, side="right"))
            document = next(self._streams[chosen], None)
            if document is not None:
                return document
            self._weights[chosen] = 0.0
        raise StopIteration
