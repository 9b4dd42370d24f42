"""Checkpoints that a run can be resumed from, and folders that appear whole or not at all.

Choices: `accelerate` writes and reads the states (weights as safetensors, the rest loaded with weights_only), for
sharded runs torch's distributed checkpoints do (`stored_states` lets neither run code); ours is that a checkpoint is
written beside its place, hashed, and then renamed. A kill at any moment leaves the previous checkpoints as they were; a
file damaged later is noticed by its hash and the checkpoint before it is used.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dtfcli.runs.files import shared_folder
from dtfcli.runs.folder import STATE_FILE, checkpoint_folder, list_checkpoints, step_of


@dataclass
class TrainingState:
    """Where a run stands, apart from tensors and random generators.

    Attributes:
        step: updates done.
        evaluated_step: the last step whose evaluation is in the metrics; -1: none.
        best_step, best_loss: of the best evaluation after the start; -1 and None: none yet.
        metrics_bytes: length of metrics.jsonl at this point.
        data: fingerprint of the tokenized data.
        processes: their number. A run resumed with another number continues from the same weights, but not bit for bit.
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
        until_now = [path for path in list_checkpoints(run_dir) if step_of(path) <= state.step]
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
        content = json.loads((folder / STATE_FILE).read_text("utf-8"))
        values = {field.name: content["state"][field.name] for field in fields(TrainingState)}
        state = TypeAdapter(TrainingState).validate_json(json.dumps(values), strict=True)
        hashes = dict(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read") from error
    if min(state.step, state.metrics_bytes) < 0 or state.processes < 1:
        raise ValueError(f"{STATE_FILE} has numbers below zero")
    root = folder.resolve()
    for name, expected in hashes.items():
        path = folder / name
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{name} lies outside its folder")
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
