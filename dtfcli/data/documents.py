"""From `data.sources` to documents: one text each, with the source that it came from.

Notable choices:

- `ratio` keeps a document by a hash of its content, so that the same ones stay whatever their order.
- `max_documents` takes from the sources in turns, so that a long one does not crowd out the rest.
- A conversation is a document too: its text is its JSON, which identifies it, its size that of the assistant's turns,
  which are what is learned from it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from dtfcli.data.files import STDLIB, SUFFIXES, FileReader, FolderReader, StdlibReader
from dtfcli.data.hub import HubReader
from dtfcli.data.sources import SourceReader, SourceReport, Where, similar_path
from dtfcli.errors import DataError, reason_of
from dtfcli.settings.data import Source

OnProgress = Callable[[str, float | None], None]

Message = dict[str, str]
"""One turn of a conversation: {"role": …, "content": …}."""

ASSISTANT = "assistant"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and the position in `data.sources` of the source it came from; whether it has control tokens."""

    text: str
    source: int = 0
    messages: tuple[Message, ...] = ()
    control_tokens: bool = False

    @cached_property
    def num_bytes(self) -> int:
        """The length in UTF-8 of what a model learns to write: the text, or the assistant's turns."""
        if self.messages:
            return sum(len(turn["content"].encode()) for turn in self.messages if turn["role"] == ASSISTANT)
        return len(self.text.encode())

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the content: exact duplicates share them."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


def stable_key(digest: bytes, seed: int, purpose: str) -> bytes:
    """8 pseudo-random bytes that depend on the content, the seed and their purpose, and on nothing else."""
    return hashlib.blake2b(digest, key=str(seed).encode(), person=purpose.encode(), digest_size=8).digest()


def documents(
    sources: Sequence[Source],
    *,
    seed: int,
    max_documents: int | None = None,
    options: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Document]:
    """The documents of `data.sources`, one source after the other (in turns under `max_documents`).

    Args:
        sources: Entries of `data.sources`.
        seed: Decides, with the content, which documents a `ratio` below 1 keeps.
        max_documents: Stop after this many, taken from the sources in turns.
        options: As of `open_sources`.
        on_progress: Called with a message and the share that has been read.

    Raises:
        ConfigError, DataError: as `open_sources`; a source cannot be read, or holds no document.
    """
    readers = open_sources(sources, options=options, on_progress=on_progress)
    reports = [reader.new_report() for reader in readers]
    return read_documents(readers, reports, seed=seed, max_documents=max_documents, on_progress=on_progress)


def read_documents(
    readers: Sequence[SourceReader],
    reports: Sequence[SourceReport],
    *,
    seed: int,
    max_documents: int | None = None,
    on_progress: OnProgress | None = None,
    message: str = "Reading documents",
) -> Iterator[Document]:
    """Like `documents`, from opened sources; fills one report per source (all but its tokens)."""
    shares = [0.0] * len(readers)
    pending = deque(
        _read_source(index, reader, reports[index], shares, seed=seed) for index, reader in enumerate(readers)
    )
    count, last_percent = 0, -1
    while pending and count != max_documents:
        stream = pending.popleft()
        document = next(stream, None)
        if document is not None:
            count += 1
            (pending.appendleft if max_documents is None else pending.append)(stream)
            yield document
        share = max(sum(shares) / len(shares), count / max_documents if max_documents else 0.0)
        if on_progress is not None and int(100 * share) != last_percent:
            last_percent = int(100 * share)
            on_progress(message, share)


def take_documents(documents: Iterator[Document], count: int, characters: int) -> list[Document]:
    """The next documents, as many as `count` and until they have that many characters together."""
    taken: list[Document] = []
    for document in islice(documents, count):
        taken.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    return taken


def _read_source(
    index: int, reader: SourceReader, report: SourceReport, shares: list[float], *, seed: int
) -> Iterator[Document]:
    """The documents of one source that have text and that its ratio keeps."""
    for share, row in reader.texts(report):
        shares[index] = share
        document = kept_document(index, reader, row, report, seed)
        if document is not None:
            report.documents += 1
            report.bytes += document.num_bytes
            yield document
    shares[index] = 1.0
    if not report.documents:
        raise no_document(reader, report)


def kept_document(index: int, reader: SourceReader, row: Any, report: SourceReport, seed: int) -> Document | None:
    """The document of a row that a source gave; None, and an entry in the report, where it is left out.

    Raises:
        DataError: The row is not a conversation, and the source has a `messages_field`.
    """
    if reader.messages_field:
        document = _conversation(index, reader, row, report)
    elif row is None or not row.strip():
        report.skip("without text")
        return None
    else:
        document = Document(_valid_text(row), index, control_tokens=reader.control_tokens)
    if document is not None and reader.ratio < 1 and hashed_share(document.digest, seed, "ratio") >= reader.ratio:
        report.skip(f"beyond ratio={reader.ratio:g}")
        return None
    return document


def _conversation(index: int, reader: SourceReader, row: Any, report: SourceReport) -> Document | None:
    """The turns of a conversation, with its role and content alone."""
    turns = row or ()
    for turn in turns:
        if not (isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))):
            raise DataError(
                f"{reader.where.given('messages_field', reader.messages_field)}: a turn of a conversation in "
                f'\'{reader.path}\' is no {{"role": "…", "content": "…"}}: {str(turn)[:80]}.'
            )
    if not any(turn["role"] == ASSISTANT and turn["content"].strip() for turn in turns):
        report.skip(f"without an {ASSISTANT}'s turn")
        return None
    messages = tuple({"role": turn["role"], "content": _valid_text(turn["content"])} for turn in turns)
    return Document(json.dumps(messages, ensure_ascii=False), index, messages)


def _valid_text(text: str) -> str:
    r"""A lone surrogate (a broken "\ud800" in JSON) is not text in any encoding and is replaced."""
    return _SURROGATES.sub("\ufffd", text)


def hashed_share(digest: bytes, seed: int, purpose: str) -> float:
    """`stable_key` as a number from 0 up to, but not, 1."""
    return int.from_bytes(stable_key(digest, seed, purpose)) / 2**64


def no_document(reader: SourceReader, report: SourceReport) -> DataError:
    """What to tell about a source from which nothing can be used."""
    dropped = any(reason.startswith("beyond ratio") for reason in report.skipped)
    remedy = "raise the ratio or add text" if dropped else "add files with text"
    details = report.describe_skipped() or "it has no rows"
    return DataError(f"{reader.label}: no document to use ({details}); {remedy}.")


def open_sources(
    sources: Sequence[Source], *, options: Mapping[str, str] | None = None, on_progress: OnProgress | None = None
) -> list[SourceReader]:
    """Check the entries of `data.sources` and find what they name; texts are read later.

    Args:
        sources: The entries.
        options: Of a command that names the source by options, by the setting whose place they take; for messages.
        on_progress: Called before something is fetched from the Hub.

    Raises:
        ConfigError: A setting that nothing reads, or a Hub configuration or split that does not exist.
        DataError: A path that does not exist, a Hub data set that cannot be opened.
    """
    places = (Where(f"data.sources[{i}]", options or {}) for i in range(len(sources)))
    return [_open(where, source, on_progress) for where, source in zip(places, sources, strict=True)]


def _open(where: Where, source: Source, on_progress: OnProgress | None) -> SourceReader:
    if source.path == STDLIB:
        return StdlibReader(where, source)
    try:
        path = Path(source.path).expanduser()
        if path.is_dir():
            return FolderReader(where, source, path)
        if path.is_file():
            return FileReader(where, source, path)
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # no permission to look, a name too long, an unknown ~user
        raise DataError(f"{where.given('path', source.path)}: {reason_of(error)}.") from error
    if exists:
        raise DataError(f"{where.given('path', source.path)}: neither a file nor a folder.")
    _check_not_a_lost_path(where.given("path", source.path), source.path, path)
    if on_progress is not None:
        on_progress(f"Loading {source.path} from the Hub", None)
    return HubReader(where, source)


def _check_not_a_lost_path(label: str, name: str, path: Path) -> None:
    """Raise for a name that is meant as a local path, so that the Hub is not asked for it."""
    if difflib.get_close_matches(name, [STDLIB], cutoff=0.8):
        raise DataError(f"{label}: no such source. Did you mean '{STDLIB}'?")
    hint = similar_path(path)
    no_hub_id = not _HUB_ID.fullmatch(name) or name.startswith(".") or path.suffix.lower() in SUFFIXES
    if no_hub_id or (len(path.parts) > 1 and hint):
        remedy = hint or f" Name an existing folder or file, a Hub data set (owner/name) or '{STDLIB}'."
        raise DataError(f"{label}: no such file or folder.{remedy}")
