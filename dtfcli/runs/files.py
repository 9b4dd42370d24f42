"""Writes to a run folder: files appear whole or not at all, and a full disk is explained."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dtfcli.errors import DTFError, plain, reading


@contextmanager
def explained_write_errors(folder: Path, remedy: str = "choose another run.output_dir") -> Iterator[None]:
    """Turn the errors of a full disk, a missing permission or a lost folder into one line with the folder and a remedy.

    safetensors and torch report them with other errors, whose text is searched.

    Raises:
        DTFError: the folder cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error)
        in_text = re.search(r"\(os error (\d+)\)", text)
        number = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "PytorchStreamWriter" in text:
            reason = "the disk is full; free some space"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text:
            reason = "no permission to write there"
        elif number in (errno.ENOENT, errno.ESTALE):
            reason = "it was removed, or its disk is gone; put it back"
        elif number is not None:
            reason = os.strerror(number)
        elif isinstance(error, OSError):
            reason = text
        else:
            raise
        raise DTFError(f"{folder}: cannot be written, {reason}, or {remedy}.") from error


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one around it, that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))


def is_writable(folder: Path) -> bool:
    """Whether it is a folder that files can be made in."""
    return folder.is_dir() and os.access(folder, os.W_OK)


def file_hash(path: Path) -> str:
    """The sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file to write next to `path`, which takes its place when the block ends: readers see the old one or the new."""
    partial = _partial(path)
    yield partial
    os.replace(partial, path)


@contextmanager
def replaced_folder(folder: Path, remedy: str = "choose another run.output_dir") -> Iterator[Path]:
    """A folder to fill next to `folder`, which takes its place when the block ends without an error."""
    partial, previous = _partial(folder), folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explained_write_errors(folder.parent, remedy):
            partial.mkdir(parents=True)
            yield partial
            _flush(partial)
            if folder.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(folder, previous)
                os.replace(partial, folder)
                shutil.rmtree(previous, ignore_errors=True)
            else:
                os.replace(partial, folder)
            _flush_names(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def shared_folder(folder: Path, processes: Any) -> Iterator[Path]:
    """As `replaced_folder`, for several processes that fill it together; all go on when it has its place."""
    with replaced_folder(folder) if processes.is_main else nullcontext(_partial(folder)) as partial:
        processes.barrier()
        with explained_write_errors(folder.parent):
            yield partial
    processes.barrier()


def tidy_folders(parent: Path) -> None:
    """Clear up after a kill inside `replaced_folder`: put back folders moved aside, remove incomplete ones."""
    for previous in parent.glob(".*.previous"):
        folder = parent / previous.name[1:].removesuffix(".previous")
        if not folder.exists():
            os.replace(previous, folder)
    for leftover in [*parent.glob(".*.previous"), *parent.glob(".*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush files to the disk before they are renamed: power may fail in between. They get the folder's own mode."""
    mode = folder.stat().st_mode & 0o666  # safetensors lets nobody else read
    for path in folder.rglob("*"):
        if not path.is_dir():
            path.chmod(mode)
            _sync(path)
    for path in [*folder.rglob("*/"), folder]:
        _flush_names(path)


def _flush_names(folder: Path) -> None:
    with suppress(OSError):  # not every system and file system can do that
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


class MetricsLog:
    """Appends lines to metrics.jsonl, each whole and flushed."""

    def __init__(
        self,
        path: Path,
        keep_bytes: int = 0,
        writes: bool = True,
        on_line: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Open the log and cut it off at `keep_bytes`: the rest was written after the checkpoint that is resumed.

        Without `writes`, in a process that is not the main one, nothing is opened or written. `on_line` gets every
        line too.
        """
        self.path, self.writes, self._on_line = path, writes, on_line
        if not writes:
            return
        with explained_write_errors(path.parent):
            path.touch()
            os.truncate(path, min(keep_bytes, path.stat().st_size))

    def write(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Append one line and return it: None takes the place of NaN and infinity, for which JSON has no number."""
        line = plain(metrics)
        if self.writes:
            with explained_write_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._on_line(line)
        return line

    @property
    def bytes(self) -> int:
        if not self.writes:
            return 0
        with explained_write_errors(self.path.parent):
            return self.path.stat().st_size


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, up to the first that is damaged; a kill cuts off the last one.

    Raises:
        CheckpointError: the file cannot be read at all.
    """
    lines = []
    with reading(path, "check its permissions, or start a new run"):
        content = path.read_bytes()
    for line in content.splitlines():
        try:
            metrics = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            break
        if not _is_metrics(metrics):
            break
        lines.append(metrics)
    return lines


def _is_metrics(line: Any) -> bool:
    """Whether `MetricsLog` has written a line: figures by name, and a whole number for the step."""
    if not isinstance(line, dict) or not isinstance(line.get("step", 0), int):
        return False
    figures = [value for name, value in line.items() if name.startswith(("train/", "val/"))]
    return all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in figures)
