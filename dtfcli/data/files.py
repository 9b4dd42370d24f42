"""Sources on this machine: files, folders, and the standard library of the running Python.

Notable choices:

- A text file is one document; every row of a .jsonl or .parquet file is one.
- Files are visited in sorted order, hidden ones are left out, and what is skipped is counted by reason.
- In a folder laid out by split (`train.parquet`, `validation/…`), only files of the source's split are read.
- `python-stdlib` leaves out tests, generated tables (character maps, entities) and what the build wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from dtfcli.data.sources import DEFAULT_FIELD, Shard, SourceReader, SourceReport, Where
from dtfcli.errors import DataError, leads_out, reason_of
from dtfcli.settings.data import Source

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
STDLIB = "python-stdlib"

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Files up to this many bytes per source are fingerprinted by content, larger sources by sizes and times.
_HASH_CONTENT_UP_TO = 64 * 2**20
_STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_STDLIB_SKIPPED_FILES = re.compile(r"pydoc_data/topics\.py|html/entities\.py|_sysconfigdata.*|config-.*/.*")
_STDLIB_TABLE = re.compile(r"^(decoding|encoding)_(table|map)\s*=", re.MULTILINE)


_OUTSIDE = "link out of the folder"


class _Unusable(Exception):
    """A file that can be skipped among others: why, in a word or two, and what to do about it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class _LocalReader(SourceReader):
    """Files on this machine, in the order given."""

    def __init__(self, where: Where, source: Source, root: Path):
        super().__init__(where, source)
        self.root = Path(os.path.abspath(root))
        self.files: list[Path] = []
        if self.name:
            self._refuse("name", "it names a configuration of a Hub data set, and this source is local")

    def _refuse_fields(self, why: str) -> None:
        """Raise if the source names a column, which plain texts do not have."""
        if self.text_field != DEFAULT_FIELD:
            self._refuse("text_field", why)
        if self.messages_field:
            self._refuse("messages_field", why)

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def open_shard(self, index: int, state: Any, report: SourceReport) -> Shard:
        start = int(state or 0)
        rows = (row for _, row in self._shard_rows(index, report))
        return Shard(islice(rows, start, None), start)

    def identity(self) -> dict[str, Any]:
        by_content = sum(_size(file) for file in self.files) <= _HASH_CONTENT_UP_TO
        states = [_state(file, by_content) for file in self.files]
        files = [(str(file.relative_to(self.root)), state) for file, state in zip(self.files, states, strict=True)]
        return {**super().identity(), "path": str(self.root), "files": files}

    def texts(self, report: SourceReport) -> Iterator[tuple[float, Any]]:
        sizes = [_size(file) for file in self.files]
        read, total = 0, sum(sizes)
        for index, size in enumerate([*sizes, 0][: self.num_shards]):  # the standard library has a shard more
            for share, text in self._shard_rows(index, report):
                yield (read + size * share) / total, text
            read += size

    def _shard_rows(self, index: int, report: SourceReport) -> Iterator[tuple[float, Any]]:
        """The rows of a file; one that cannot be used is skipped among others, and an error alone."""
        file = self.files[index]
        try:
            yield from self._read(file)
        except _Unusable as problem:
            if file == self.root:
                raise DataError(f"{self.label}: the file is {problem.reason}; {problem.remedy}.") from problem
            report.skip(problem.reason)

    def _read(self, file: Path) -> Iterator[tuple[float, Any]]:
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            return self._read_jsonl(file)
        if suffix == ".parquet":
            return self._read_parquet(file)
        return iter([(1.0, read_text(file))])

    def _read_jsonl(self, file: Path) -> Iterator[tuple[float, Any]]:
        column, size, read = "", _size(file), 0
        kind: type = list if self.messages_field else str
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    read += len(line)
                    if line.isspace():
                        continue
                    record = _parse_line(line, f"{file}, line {number}")
                    if not column:
                        holds_text = {key: isinstance(value, kind | None) for key, value in record.items()}
                        column = self._choose_field(holds_text, f"{file}, line {number}")
                    text = record.get(column, ...)
                    if text is not None and not isinstance(text, kind):
                        wanted, field = ("list", "messages") if self.messages_field else ("string", "text")
                        problem = "is missing" if text is ... else f"is not a {wanted} ({type(text).__name__})"
                        raise DataError(f"{file}, line {number}: the {field} field '{column}' {problem}.")
                    yield read / size, text
        except OSError as error:
            raise _Unusable("unreadable", reason_of(error)) from error
        if not column:
            raise _Unusable("empty", 'expected one JSON object per line, e.g. {"text": "…"}')

    def _read_parquet(self, file: Path) -> Iterator[tuple[float, Any]]:
        import pyarrow
        import pyarrow.parquet

        def holds_text(kind: Any) -> bool:
            if self.messages_field:
                lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
                return lists and pyarrow.types.is_struct(kind.value_type)
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())

        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                columns = {column.name: holds_text(column.type) for column in table.schema_arrow}
                column = self._choose_field(columns, str(file))
                read, total = 0, table.metadata.num_rows
                if total == 0:
                    raise _Unusable("empty", "it has no rows")
                # Rows can be whole books: few at a time keep memory flat.
                for batch in table.iter_batches(batch_size=16, columns=[column]):
                    for value in batch.column(0):
                        read += 1
                        yield read / total, value.as_py()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and not os.access(file, os.R_OK):
                raise _Unusable("unreadable", reason_of(error)) from error
            raise DataError(f"{file}: not a readable Parquet file ({reason_of(error)}).") from error


class FileReader(_LocalReader):
    """A single file."""

    def __init__(self, where: Where, source: Source, root: Path):
        super().__init__(where, source, root)
        suffix = root.suffix.lower()
        if suffix not in SUFFIXES:
            ending = f"ending in '{suffix}'" if suffix else "without an ending"
            raise DataError(f"{self.label}: files {ending} are not read, only {' '.join(SUFFIXES)}.")
        if source.split != "train":
            self._refuse("split", "a single file has no splits")
        if suffix in TEXT_SUFFIXES:
            self._refuse_fields(f"a {suffix} file is one text")
        self.files = [self.root]


class FolderReader(_LocalReader):
    """Every .txt .md .py .jsonl .parquet file beneath a folder, hidden files and other splits left out."""

    def __init__(self, where: Where, source: Source, root: Path):
        super().__init__(where, source, root)
        self.skipped: Counter[str] = Counter()
        self.other_splits: set[str] = set()
        files = self._walk()
        readable = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not readable:
            endings = sorted({file.suffix.lower() or "no ending" for file in files})
            others = f"found: {', '.join(endings[:8])}" if endings else "it is empty"
            if outside := self.skipped[_OUTSIDE]:
                others = f"{outside} links out of the folder are not followed"
            raise DataError(f"{self.label}: no {' '.join(SUFFIXES)} file beneath this folder ({others}).")
        self.files = [file for file in readable if self._in_split(file)]
        if not self.files:
            splits = ", ".join(sorted(self.other_splits)) or "none"
            raise DataError(
                f"{where.given('split', source.split)}: the folder '{source.path}' has no files of this split "
                f"(splits found: {splits}); {where.remedy('split', 'one of them')}name a file."
            )
        tables = [file for file in self.files if file.suffix.lower() in TABLE_SUFFIXES]
        if not tables:
            self._refuse_fields("the folder has no .jsonl or .parquet files")
        self.files = tables if source.messages_field else self.files

    def new_report(self) -> SourceReport:
        return SourceReport(self.path, skipped=dict(+self.skipped))

    def _walk(self) -> list[Path]:
        def count_error(_: OSError) -> None:
            self.skipped["unreadable folder"] += 1

        files = []
        for folder, folders, names in os.walk(self.root, onerror=count_error):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        return sorted(file for file in files if self._is_ours(file))

    def _is_ours(self, file: Path) -> bool:
        """Whether this is a file, and no link to one outside the folder."""
        with suppress(OSError, RuntimeError):  # a link to itself
            if file.is_file():
                self.skipped[_OUTSIDE] += (outside := leads_out(self.root, file))
                return not outside
        return False

    def _in_split(self, file: Path) -> bool:
        """Whether the source's split has this file; texts, and tables that name no split, are of "train"."""
        split = "train"
        if file.suffix.lower() in TABLE_SUFFIXES:
            stem = re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", file.stem)
            for part in (*file.relative_to(self.root).parts[:-1], stem):
                split = next((name for name, words in _SPLITS.items() if part.lower() in words), split)
        wanted = next((name for name, words in _SPLITS.items() if self.split in words), self.split)
        if split != wanted:
            self.skipped[f"of split '{split}'"] += 1
            self.other_splits.add(split)
        return split == wanted


class StdlibReader(_LocalReader):
    """The running interpreter's standard library: its sources and the topics of its language reference."""

    def __init__(self, where: Where, source: Source):
        super().__init__(where, source, Path(sysconfig.get_path("stdlib")))
        if source.split != "train":
            self._refuse("split", f"{STDLIB} has no splits")
        self._refuse_fields(f"{STDLIB} consists of plain texts")
        files = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED_FOLDERS]
            files += [Path(folder, name) for name in names if name.endswith((".py", ".txt", ".rst", ".md"))]
        self.files = [
            file
            for file in sorted(files)
            if file.is_file() and not _STDLIB_SKIPPED_FILES.fullmatch(file.relative_to(self.root).as_posix())
        ]
        if not self.files:
            missing = f"this Python has no sources of its standard library in {self.root}"
            raise DataError(f"{self.label}: {missing}; name a folder of texts instead.")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "python": sys.version}

    @property
    def num_shards(self) -> int:
        return len(self.files) + 1

    def _shard_rows(self, index: int, report: SourceReport) -> Iterator[tuple[float, Any]]:
        if index == len(self.files):
            with suppress(ImportError):  # some distributions ship it apart
                from pydoc_data.topics import topics

                yield from ((1.0, topics[name]) for name in sorted(topics))
            return
        for share, text in super()._shard_rows(index, report):
            if _STDLIB_TABLE.search(text):
                report.skip("generated table")
            else:
                yield share, text


def _size(file: Path) -> int:
    """The file's size for progress and limits: at least 1, also where it cannot be looked at."""
    try:
        return max(1, file.stat().st_size)
    except OSError:
        return 1


def _state(file: Path, by_content: bool) -> object:
    """What changes when the file does: a hash of its content, or its size and time; None if unreadable."""
    try:
        if by_content:
            return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def read_text(file: Path) -> str:
    """A text file's content as it is, without a byte-order mark."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _Unusable("unreadable", reason_of(error)) from error
    if not content.strip():
        raise _Unusable("empty", "name a file with text")
    if b"\0" in content:
        raise _Unusable("binary", "it holds NUL bytes; name a UTF-8 text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("not UTF-8", f"byte {error.start} cannot be decoded; save it as UTF-8") from error


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line).") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else reason_of(error)
        raise DataError(f"{where}: broken JSON ({reason}); fix or remove the line.") from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object such as {{"text": "…"}}, found {type(record).__name__}.')
    return record
