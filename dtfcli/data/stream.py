"""Rows of tokens made while a model trains on them, ahead of it and in the background.

A position is the state of the mixture before a batch of documents, the tokens left over from the documents before,
and the number of the next row: small enough for a checkpoint, and from there on the rows are the same, bit for bit.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dtfcli.data.documents import Document, open_sources, take_documents
from dtfcli.data.mixture import Mixture, SourceStream, draw_weights, is_held_out
from dtfcli.data.sources import SourceReader, SourceReport
from dtfcli.data.tokenizer import document_encoder
from dtfcli.settings.data import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POSITION = ("first", "left", "mixture")
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**19
_AHEAD = 4
_POLL_SECONDS = 0.2
_GOODBYE_SECONDS = 5.0


def stream_identity(data: DataSettings) -> dict[str, Any]:
    """What decides the rows of a stream, beyond what decides the rows of whole sources."""
    return {
        "weights": draw_weights(data.sources),
        "shuffle_buffer": data.shuffle_buffer,
        "validation_blocks": data.validation_blocks,
    }


def document_mixture(
    readers: Sequence[SourceReader],
    data: DataSettings,
    seed: int,
    *,
    held_out: bool,
    passes: int | None = None,
    on_pass: Callable[[int, int], None] = lambda source, count: None,
) -> Mixture:
    """The documents of one side of the split.

    Args:
        readers: of `data.sources`.
        data: its settings.
        seed: of the run.
        held_out: validation documents, or those to train on.
        passes: how often each source is read; None: without end.
        on_pass: called with a source's position and the number of each pass at its end.
    """

    def wanted(document: Document) -> bool:
        return is_held_out(document, data.validation_fraction, seed) == held_out

    streams = [
        SourceStream(
            index,
            reader,
            seed=seed,
            # Few documents are held out: a window of them would read far ahead, and their order is of no account.
            window=1 if held_out else data.shuffle_buffer,
            wanted=wanted,
            passes=passes,
            on_pass=partial(on_pass, index),
        )
        for index, reader in enumerate(readers)
    ]
    return Mixture(streams, draw_weights(data.sources), seed)


@dataclass(frozen=True)
class Batch:
    """Rows made from a batch of documents.

    Attributes:
        state: from which these rows and all later ones can be made again.
        first: number of the first row.
        rows: int32 [n, T]; n may be 0.
        documents: that were begun in them.
        text_bytes: of these documents, in UTF-8.
        targets: tokens of these documents that are targets of the loss.
        notes: what happened on the way.
    """

    state: dict[str, Any]
    first: int
    rows: np.ndarray
    documents: int
    text_bytes: int
    targets: int
    notes: tuple[str, ...]

    @property
    def end(self) -> int:
        """Number of the row after the last one."""
        return self.first + len(self.rows)


def pack_stream(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    reports: Sequence[SourceReport],
    seq_len: int,
    *,
    state: dict[str, Any] | None = None,
    notes: list[str] | None = None,
) -> Iterator[Batch]:
    """Tokenize documents and cut them into rows of T = `seq_len`, a batch of documents at a time.

    Args:
        mixture: of documents; taken to where `state` says.
        tokenizer: of the run.
        reports: one per source, filled on the way.
        state: of an earlier batch, to go on from; None: the beginning.
        notes: that arise while documents are drawn; emptied into each batch.
    """
    notes = [] if notes is None else notes
    encode = document_encoder(tokenizer, reports)
    first, left = 0, np.zeros(0, dtype=np.int32)
    if state is not None:
        first, left = state["first"], np.array(state["left"], dtype=np.int32)
        mixture.restore(state["mixture"])
    while True:
        state = {"first": first, "left": left.tolist(), "mixture": mixture.state()}
        documents = take_documents(mixture, _BATCH_DOCUMENTS, _BATCH_CHARACTERS)
        if not documents:
            return
        encoded = list(encode(documents))
        tokens = np.concatenate([left, *(ids for _, ids in encoded)])
        count = len(tokens) // seq_len
        rows, left = tokens[: count * seq_len].reshape(count, seq_len), tokens[count * seq_len :]
        yield Batch(
            state=state,
            first=first,
            rows=rows,
            documents=len(encoded),
            text_bytes=sum(document.num_bytes for document, _ in encoded),
            targets=sum(int(np.count_nonzero(ids >= 0)) for _, ids in encoded),
            notes=tuple(notes),
        )
        notes.clear()
        first += count


def read_head(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    reports: Sequence[SourceReport],
    seq_len: int,
    count: int,
    on_progress: Callable[[float], None],
) -> tuple[np.ndarray, int, float]:
    """The first `count` rows of a mixture, int32 [n, T], or all there are; how many documents, and bytes per target."""
    parts = [np.zeros((0, seq_len), dtype=np.int32)]
    documents = text_bytes = targets = 0
    for batch in pack_stream(mixture, tokenizer, reports, seq_len) if count else ():
        parts.append(batch.rows)
        documents, text_bytes = documents + batch.documents, text_bytes + batch.text_bytes
        targets += batch.targets
        on_progress(min(1.0, batch.end / count))
        if batch.end >= count:
            break
    return np.concatenate(parts)[:count], documents, text_bytes / targets if targets else float("nan")


class Prefetcher:
    """Runs an iterator in a background thread, a few items ahead; its errors are raised where items are taken."""

    def __init__(self, items: Iterator[Batch]) -> None:
        """Start at once."""
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        # A daemon: a thread that waits for the network must not keep a stopped run alive.
        self._thread = threading.Thread(target=self._work, args=(items,), name="dtf-stream", daemon=True)
        self._thread.start()

    def _work(self, items: Iterator[Batch]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # raised again by `take`
            self._put(error)
        finally:
            getattr(items, "close", lambda: None)()

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
        return False

    def take(self, check: Callable[[], None]) -> Batch:
        """The next item; `check` is called while waiting, and may raise."""
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                check()
                continue
            if isinstance(item, BaseException):
                self._put(item)  # for whoever asks again
                raise item
            return item

    def close(self) -> None:
        """End the thread, or leave it behind if it waits for the network."""
        self._closed.set()
        self._thread.join(timeout=_GOODBYE_SECONDS)


class RowStream:
    """The rows to train on, in order, one update after the other."""

    def __init__(
        self,
        data: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        state: dict[str, Any] | None = None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        """Open the sources (as `prepare_data` does) and begin to read.

        Args:
            data: with sources that stream.
            tokenizer: of the run; a copy is used, since tokenizers are not safe to share with a thread.
            seed: of the run.
            state: of an earlier stream, to go on from; None: the beginning.
            on_note: called, by the thread that takes rows, when a source begins again.
        """
        readers = open_sources(data.sources)
        reports = [reader.new_report() for reader in readers]
        notes: list[str] = []

        def note_pass(source: int, passes: int) -> None:
            if passes == 1:
                notes.append(f"data.sources[{source}] ({readers[source].path}) was read to its end and begins again.")

        mixture = document_mixture(readers, data, seed, held_out=False, on_pass=note_pass)
        self._next: int = state["next"] if state else 0
        self._saved = {key: state[key] for key in _POSITION} if state and "mixture" in state else None
        self._batches: deque[Batch] = deque()
        self._on_note = on_note
        self._source = Prefetcher(
            pack_stream(mixture, copy.deepcopy(tokenizer), reports, data.seq_len, state=self._saved, notes=notes)
        )

    def take(self, count: int, check: Callable[[], None] = lambda: None) -> np.ndarray:
        """The next `count` rows, int32 [count, T]; `check` is called while text is awaited.

        Raises:
            DataError: a source cannot be read any more. No row is lost, nor when `check` raises.
        """
        end = self._next + count
        while not self._batches or self._batches[-1].end < end:
            batch = self._source.take(check)
            for note in batch.notes:
                self._on_note(note)
            self._batches.append(batch)
        rows = np.concatenate(
            [batch.rows[max(0, self._next - batch.first) : max(0, end - batch.first)] for batch in self._batches]
        )
        self._next = end
        while len(self._batches) > 1 and self._batches[0].end <= end:
            self._batches.popleft()
        return rows

    def state(self) -> dict[str, Any]:
        """The place from which a stream continues with the next row; plain JSON."""
        begin = self._batches[0].state if self._batches else self._saved
        return {**(begin or {}), "next": self._next}

    def close(self) -> None:
        """Stop reading."""
        self._source.close()
