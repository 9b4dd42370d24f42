"""Checkpoints that a run can be resumed from, and folders that appear whole or not at all.

Choices: `accelerate` writes and reads the states (weights as safetensors, the rest loaded with weights_only), for
sharded runs torch's distributed checkpoints do; ours is that a checkpoint is written beside its place, hashed, and
then renamed. A kill at any moment leaves the previous checkpoints as they were; a file damaged later is noticed by
its hash and the checkpoint before it is used.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dtfcli.errors import DTFError

STATE_FILE = "state.json"

_NAME = re.compile(r"step-\d+")


@dataclass
class TrainingState:
    """Where a run stands, apart from tensors and random generators.

    Attributes:
        step: updates done.
        evaluated_step: the last step whose evaluation is in the metrics; -1: none.
        best_step, best_loss: of the best evaluation after the start; -1 and None: none yet.
        metrics_bytes: length of metrics.jsonl at this point.
        data: fingerprint of the tokenized data.
        processes: how many trained; another number goes on from the same weights, but not bit for bit.
        stream: position in sources that stream (`stream.RowStream.state`); None: none do.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    metrics_bytes: int = 0
    data: str = ""
    processes: int = 1
    stream: dict[str, Any] | None = None


@contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk or a missing permission raises into one line that names the folder and the remedy.

    safetensors and torch report a full disk with errors of their own, so those are looked through too.

    Raises:
        DTFError: the folder cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        text = str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "PytorchStreamWriter" in text:
            reason = "the disk is full; free some space"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text:
            reason = "no permission to write there"
        elif isinstance(error, OSError):
            reason = error.strerror or text
        else:
            raise
        raise DTFError(f"{folder}: cannot be written, {reason}, or choose another run.output_dir.") from error


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`, which takes its place when the block ends without an error."""
    partial, previous = _partial(folder), folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explained_write_errors(folder.parent):
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
        processes.wait()
        with explained_write_errors(folder.parent):
            yield partial
    processes.wait()


def _flush(folder: Path) -> None:
    """Bring what was written to the disk, before a rename says that it is there: power may fail, too."""
    for path in folder.rglob("*"):
        if not path.is_dir():
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


def tidy_folders(parent: Path) -> None:
    """Clear up after a kill inside `replaced_folder`: put back what was moved aside, remove what is incomplete."""
    for previous in parent.glob(".*.previous"):
        folder = parent / previous.name[1:].removesuffix(".previous")
        if not folder.exists():
            os.replace(previous, folder)
    for leftover in [*parent.glob(".*.previous"), *parent.glob(".*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    found = {path: _NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*")}
    return sorted((path for path, name in found.items() if name), key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(states: Any, run_dir: Path, state: TrainingState, keep: int, processes: Any) -> Path:
    """Write a checkpoint and remove all but the newest `keep` up to it; every process takes part.

    Later ones are of a course that was left because they are damaged: they count for nothing, and are written over.

    Args:
        states: saves model, optimizer and random generators into a folder (`sharding`).
        run_dir: the run folder.
        state: where the run stands.
        keep: checkpoints to keep, at least 1.
        processes: of the run.

    Raises:
        DTFError: the folder cannot be written to.
    """
    folder = checkpoint_folder(run_dir, state.step)
    with shared_folder(folder, processes) as partial:
        states.save(partial)
        processes.wait()
        if processes.is_main:
            files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            hashes = {path.relative_to(partial).as_posix(): _hash(path) for path in files}
            (partial / STATE_FILE).write_text(json.dumps({"state": asdict(state), "sha256": hashes}, indent=2))
    if processes.is_main:
        until_now = [path for path in list_checkpoints(run_dir) if _step_of(path) <= state.step]
        for old in until_now[max(1, keep) :]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def find_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> tuple[Path, TrainingState] | None:
    """The newest undamaged checkpoint of a run; damaged ones are named to `warn` and passed over."""
    for folder in list_checkpoints(run_dir):
        try:
            return folder, read_state(folder)
        except ValueError as error:
            warn(f"{folder} is damaged ({error}); looking for the checkpoint before it.")
    return None


def read_state(folder: Path) -> TrainingState:
    """A checkpoint's state, after its files have been compared with their hashes.

    Raises:
        ValueError: what is damaged.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        state = TrainingState(**{field.name: content["state"][field.name] for field in fields(TrainingState)})
        hashes = dict(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        try:
            matches = _hash(path) == expected
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        if not matches:
            raise ValueError(f"{name} does not match its hash")
    return state


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
