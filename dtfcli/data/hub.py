"""Sources on the Hugging Face Hub, through `datasets`: whole and cached, or streamed shard by shard.

A shard that stops for the network's sake is opened again where it was, a few times, and then ends the run in one line.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dtfcli.data.sources import Shard, SourceReader, SourceReport, Where, similar_path
from dtfcli.errors import ConfigError, DataError, reason_of
from dtfcli.quiet import quiet_libraries
from dtfcli.settings.data import Source

RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try at a stream that broke."""

_NO_CONNECTION = {"ConnectionError", "TimeoutError", "TransportError"}
_NETWORK_TROUBLE = {*_NO_CONNECTION, "ClientError", "RequestException"}
"""Names of what requests, httpx, aiohttp and Python itself raise for a connection that breaks."""
_OFFLINE = {*_NO_CONNECTION, "OfflineModeIsEnabled", "LocalEntryNotFoundError", "OfflineError"}


class SourceLost(DataError):
    """A source could be read, and then no more: nothing is wrong with what the user typed."""

    exit_code = 1


class HubReader(SourceReader):
    """A data set of the Hugging Face Hub, through `datasets` and its cache."""

    def __init__(self, where: Where, source: Source):
        super().__init__(where, source)
        import datasets.packaged_modules

        # By the name of a file format, `load_dataset` would gather such files from the working folder.
        if source.path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
            raise DataError(
                f"{self.label}: no such file or folder, and no data set of the Hub but a file format."
                f"{similar_path(Path(source.path))} Name a folder or file, or owner/name on the Hub."
            )
        self.version = ""
        try:
            with quiet_libraries():
                if source.streaming:
                    builder = datasets.load_dataset_builder(source.path, source.name or None)
                    self.version = str(builder.hash)
                    self.rows = builder.as_streaming_dataset(split=source.split)
                else:
                    self.rows = datasets.load_dataset(source.path, source.name or None, split=source.split)
                features = self.rows.features or getattr(self.rows._resolve_features(), "features", None) or {}
        except Exception as error:  # the libraries beneath raise dozens of types; users get one line
            raise _explain_hub_error(error, self.label, where, source) from error
        holds = _holds_conversations if source.messages_field else _holds_text
        columns = {name: holds(feature) for name, feature in features.items()}
        self.column = self._choose_field(columns, f"{self.label} (Hub)")

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def open_shard(self, index: int, state: Any, report: SourceReport) -> Shard:
        part = self.rows.select_columns([self.column]).shard(self.num_shards, index)
        return _HubShard(part, self.column, state, self.label)

    def identity(self) -> dict[str, Any]:
        if self.version:
            return {**super().identity(), "column": self.column, "state": self.version}
        # Not when they were written: each machine of a run may have fetched them at another time.
        files = [(os.path.basename(f["filename"]), os.path.getsize(f["filename"])) for f in self.rows.cache_files]
        state = getattr(self.rows, "_fingerprint", None)
        return {**super().identity(), "column": self.column, "state": state, "files": files}

    def texts(self, report: SourceReport) -> Iterator[tuple[float, Any]]:
        read, total = 0, max(1, len(self.rows))
        try:
            for batch in self.rows.select_columns([self.column]).iter(batch_size=16):
                for text in batch[self.column]:
                    read += 1
                    yield read / total, text
        except (OSError, ValueError) as error:
            raise DataError(f"{self.label}: reading row {read} failed ({reason_of(error)}).") from error


def _holds_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _holds_conversations(feature: Any) -> bool:
    turn = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(turn, dict) and {"role", "content"} <= turn.keys()


class _HubShard(Shard):
    """The rows of one shard of a streamed data set; the position is the library's own state."""

    def __init__(self, part: Any, column: str, state: Any, label: str, sleep: Callable[[float], None] = time.sleep):
        self._part, self._column, self._label, self._sleep = part, column, label, sleep
        self._state = state
        self._open()

    def _open(self) -> None:
        if self._state is not None:
            self._part.load_state_dict(self._state)
        self._iterator = iter(self._part)

    def __next__(self) -> Any:
        """The next row, after a few tries if need be.

        Raises:
            SourceLost: The Hub cannot be reached any more.
            DataError: What comes from there cannot be read.
        """
        waits = iter(RETRY_WAITS)
        while True:
            try:
                row = next(self._iterator)
            except StopIteration:
                raise
            except Exception as error:  # the libraries beneath raise dozens of types
                if not _is_passing(error):
                    raise DataError(f"{self._label}: a row cannot be read ({reason_of(error)}).") from error
                wait = next(waits, None)
                if wait is None:
                    raise SourceLost(
                        f"{self._label}: the Hub cannot be reached any more ({reason_of(error)}), after "
                        f"{len(RETRY_WAITS) + 1} tries."
                    ) from error
                self._sleep(wait)
                self._open()
            else:
                self._state = self._part.state_dict()
                return row[self._column]

    def state(self) -> Any:
        return self._state


def _is_passing(error: BaseException) -> bool:
    """Whether trying again can help: a connection that broke, or a server that has trouble."""
    link: BaseException | None = error
    while link is not None:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        if {kind.__name__ for kind in type(link).__mro__} & _NETWORK_TROUBLE:
            return True
        link = link.__cause__ or link.__context__
    return False


def _explain_hub_error(error: Exception, label: str, where: Where, source: Source) -> ConfigError | DataError:
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return DataError(
            f"{label}: neither a local file or folder nor a data set you can read on the Hub"
            f"{similar_path(Path(source.path))} (private or gated ones need `hf auth login`)."
        )
    if {kind.__name__ for kind in type(error).__mro__} & _OFFLINE:
        return DataError(
            f"{label}: no such local file or folder, and the Hub cannot be reached (offline?)."
            f"{similar_path(Path(source.path))} Remedy: name a local folder or file."
        )
    if isinstance(error, ValueError) and "split" in str(error):
        return ConfigError(f"{where.given('split', source.split)} of '{source.path}': {reason_of(error)}.")
    if isinstance(error, ValueError) and "onfig" in str(error):
        listed = re.search(r"(available configs|Available): \[.*?\]", str(error), re.DOTALL)
        detail = listed.group(0) if listed else reason_of(error)
        return ConfigError(f"{where.given('name', source.name or '(none)')} of '{source.path}': {detail}.")
    return DataError(f"{label}: the Hub data set cannot be opened: {reason_of(error)}.")
