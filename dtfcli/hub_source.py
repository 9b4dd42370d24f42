"""Sources on the Hugging Face Hub, through `datasets` and its cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, DataError
from dtfcli.settings import Source
from dtfcli.sources import SourceReader, SourceReport, first_line, similar_path


class HubReader(SourceReader):
    """A data set of the Hugging Face Hub, through `datasets` and its cache."""

    def __init__(self, where: str, source: Source):
        super().__init__(where, source)
        import datasets.packaged_modules

        label = f"{where}.path = '{source.path}'"
        # By the name of a file format, `load_dataset` would gather such files from the working folder.
        if source.path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
            raise DataError(
                f"{label}: no such file or folder, and no data set of the Hub but a file format."
                f"{similar_path(Path(source.path))} Name a folder or file, or owner/name on the Hub."
            )
        try:
            with _quiet_hub():
                self.rows = datasets.load_dataset(source.path, source.name or None, split=source.split)
        except Exception as error:  # the libraries beneath raise dozens of types; users get one line
            raise _explain_hub_error(error, label, where, source) from error
        columns = {
            name: getattr(feature, "dtype", None) in ("string", "large_string")
            for name, feature in self.rows.features.items()
        }
        self.column = self._choose_field(columns, f"{label} (Hub)")

    def identity(self) -> dict[str, Any]:
        files = []
        for entry in self.rows.cache_files:
            stat = os.stat(entry["filename"])
            files.append((os.path.basename(entry["filename"]), stat.st_size, stat.st_mtime_ns))
        state = getattr(self.rows, "_fingerprint", None)
        return {**super().identity(), "column": self.column, "state": state, "files": files}

    def texts(self, report: SourceReport) -> Iterator[tuple[float, str | None]]:
        done, total = 0, max(1, len(self.rows))
        try:
            for batch in self.rows.select_columns([self.column]).iter(batch_size=16):
                for text in batch[self.column]:
                    done += 1
                    yield done / total, text
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.where}.path = '{self.path}': reading row {done} failed ({first_line(error)})."
            ) from error


def _explain_hub_error(error: Exception, label: str, where: str, source: Source) -> ConfigError | DataError:
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return DataError(
            f"{label}: neither a local file or folder nor a data set you can read on the Hub"
            f"{similar_path(Path(source.path))} (private or gated ones need `hf auth login`)."
        )
    kinds = {kind.__name__ for kind in type(error).__mro__}
    unreachable = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError"}
    if kinds & (unreachable | {"TimeoutError", "OfflineError"}):
        return DataError(
            f"{label}: no such local file or folder, and the Hub cannot be reached (offline?)."
            f"{similar_path(Path(source.path))} Remedy: name a local folder or file."
        )
    text = str(error)
    if "split" in text and isinstance(error, ValueError):
        return ConfigError(f"{where}.split = '{source.split}' of '{source.path}': {first_line(error)}.")
    if "onfig" in text and isinstance(error, ValueError):
        listed = re.search(r"(available configs|Available): \[.*?\]", text, re.DOTALL)
        detail = listed.group(0) if listed else first_line(error)
        shown = f"'{source.name}'" if source.name else "(none)"
        return ConfigError(f"{where}.name = {shown} of '{source.path}': {detail}.")
    return DataError(f"{label}: the Hub data set cannot be opened: {first_line(error)}.")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep bars and retry notices of the Hub libraries off stderr; callers show progress themselves."""
    import datasets

    log = logging.getLogger("huggingface_hub")
    level, had_bars = log.level, datasets.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
