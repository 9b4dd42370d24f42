"""A source of documents, as its readers see it: what each reader offers, and what it gave.

`files` reads what lies on this machine, `hub` data sets of the Hub.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, DataError, did_you_mean
from dtfcli.settings.data import Source

DEFAULT_FIELD = "text"
"""The column that is read when `text_field` is not set."""
_OTHER_FIELDS = ("article", "content", "support")


@dataclass
class SourceReport:
    """What one source gave: documents kept, their bytes and tokens, and what was skipped, by reason."""

    source: str
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count

    def describe_skipped(self) -> str:
        """The reasons with their counts, e.g. "2 empty, 1 binary"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())


@dataclass(frozen=True)
class Where:
    """How messages name a source.

    Attributes:
        group: of its settings.
        options: of a command, by the setting whose place they take, "path" at least; none: the source is in settings.
    """

    group: str = "data.sources[0]"
    options: Mapping[str, str] = field(default_factory=dict)

    def given(self, setting: str, value: str) -> str:
        """A setting and its value as the user gave them, or, where no option has its place, as they are."""
        if not self.options:
            return f"{self.group}.{setting} = '{value}'"
        option = self.options.get(setting)
        return f"{self.options['path']}: {setting} '{value}'" if option is None else f"{option} '{value}'"

    def remedy(self, setting: str, text: str) -> str:
        """A part of a remedy that tells to set something; empty where nothing sets it."""
        key = self.options.get(setting) if self.options else f"{self.group}.{setting}"
        return f"set {key} to {text}, or " if key else ""


class SourceReader:
    """One opened source."""

    def __init__(self, where: Where, source: Source):
        self.where, self.path, self.ratio = where, source.path, float(source.ratio)
        self.name, self.split, self.text_field = source.name, source.split, source.text_field
        self.messages_field, self.control_tokens = source.messages_field, source.control_tokens
        self.label = where.given("path", source.path)

    def new_report(self) -> SourceReport:
        """An empty report under this source's name."""
        return SourceReport(self.path)

    def identity(self) -> dict[str, Any]:
        """All that decides which documents this source gives; the token cache is looked up by it."""
        identity = {name: getattr(self, name) for name in ("path", "name", "split", "text_field", "ratio")}
        read = {"messages_field": self.messages_field, "control_tokens": self.control_tokens}
        return identity | {name: value for name, value in read.items() if value}

    def texts(self, report: SourceReport) -> Iterator[tuple[float, Any]]:
        """Pairs of the share of the source read so far and a text (None where a row has none).

        With a `messages_field`, conversations in the place of texts.
        """
        raise NotImplementedError

    @property
    def num_shards(self) -> int:
        """Parts that can be read apart, in any order."""
        raise NotImplementedError

    def open_shard(self, index: int, state: Any, report: SourceReport) -> Shard:
        """One part, from the place that an earlier reader of it had reached (`state`; None: its beginning)."""
        raise NotImplementedError

    def _choose_field(self, columns: Mapping[str, bool], what: str) -> str:
        """The column that holds the text, among columns that may (True) or cannot hold strings (or conversations)."""
        requested = self.messages_field or self.text_field
        if columns.get(requested):
            return requested
        listed = ", ".join(columns) or "none"
        where = self.where.given("messages_field" if self.messages_field else "text_field", requested)
        if self.messages_field and requested in columns:
            raise DataError(f"{where}: this column of {what} holds no lists of {{role, content}}; use text_field.")
        if requested in columns:
            raise DataError(f"{what}: column '{requested}' holds no strings; columns: {listed}.")
        if self.messages_field or requested != DEFAULT_FIELD:
            raise DataError(f"{where}: no such column in {what}; columns: {listed}.{did_you_mean(requested, columns)}")
        candidates = [name for name in _OTHER_FIELDS if columns.get(name)]
        if len(candidates) == 1:
            return candidates[0]
        remedy = self.where.remedy("text_field", "one of them")
        raise DataError(f"{what}: no column '{DEFAULT_FIELD}', but {listed}; {remedy}give another file.")

    def _refuse(self, setting: str, why: str) -> None:
        given = self.where.given(setting, getattr(self, setting))
        raise ConfigError(f"{given} is not read: {why}; leave it out.")


class Shard:
    """The rows of one part of a source, and how far they have been read."""

    def __init__(self, rows: Iterator[Any], start: int = 0) -> None:
        """Count rows of an iterator whose first one is number `start`."""
        self._rows, self._done = rows, start

    def __iter__(self) -> Shard:
        return self

    def __next__(self) -> Any:
        row = next(self._rows)
        self._done += 1
        return row

    def state(self) -> Any:
        """What `open_shard` needs to go on after the row given last; plain JSON."""
        return self._done


def similar_path(path: Path) -> str:
    """A "did you mean" drawn from what lies beside the missing path, or ""."""
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    # Only the first missing part is compared; the whole path is shown, ready to be copied.
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return did_you_mean(str(path), [str(path.parent / close[0])]) if close else ""
