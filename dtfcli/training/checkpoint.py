"""The files of a run: checkpoints to resume from, and model folders to use.

Every process takes part in gathering tensors that are spread over them; the main one alone writes. `distributed`
writes and reads tensors and random generators; here a checkpoint is written next to its place, hashed, and renamed. A
kill at any moment leaves the previous checkpoints as they were. A hash shows a file that is damaged later, and the
checkpoint before it is used.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dtfcli.loading.adapters import adapt, adapter_state, is_adapted, load_adapter_state, merge, save_adapter
from dtfcli.loading.build import build_model
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import file_hash, shared_folder
from dtfcli.runs.folder import MERGED_MODEL, STATE_FILE, checkpoint_folder, list_checkpoints, step_of
from dtfcli.training.run import Run, TrainingState


def checkpoint(run: Run) -> Path:
    """Write a checkpoint of this step, and remove all but the newest `keep_checkpoints` up to it.

    Later ones are of a course that was left because they are damaged: they do not count, and are overwritten.

    Raises:
        DTFError: the folder cannot be written to.
    """
    processes, state = run.processes, run.state
    state.metrics_bytes, state.stream = run.log.bytes, run.rows.state()
    folder = checkpoint_folder(run.folder, state.step)
    with quiet_libraries(), shared_folder(folder, processes) as partial:
        run.states.save(partial)
        processes.barrier()
        if processes.is_main:
            files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            hashes = {path.relative_to(partial).as_posix(): file_hash(path) for path in files}
            (partial / STATE_FILE).write_text(json.dumps({"state": asdict(state), "sha256": hashes}, indent=2))
    if processes.is_main:
        until_now = [path for path in list_checkpoints(run.folder) if step_of(path) <= state.step]
        for old in until_now[run.settings.training.keep_checkpoints :]:
            shutil.rmtree(old, ignore_errors=True)
    run.report("checkpoint", str(folder))
    return folder


def save_model(run: Run, name: str) -> Path:
    """A model folder: float32 weights, configuration, tokenizer, code of routed models; with LoRA an adapter folder."""
    folder = run.folder / name
    adapters = run.states.whole(adapter_state(run.model)) if is_adapted(run.model) else None
    weights = run.states.whole_weights() if adapters is None else None
    with quiet_libraries(), shared_folder(folder, run.processes) as partial:
        if run.processes.is_main:
            if adapters is None:
                run.model.save_pretrained(partial, state_dict=weights)
            else:
                save_adapter(run.model, partial, adapters)
            run.tokenizer.save_pretrained(partial)
    return folder


def save_merged(run: Run) -> None:
    """The plain model folder of a LoRA run, adapters merged into the base."""
    state = run.states.whole(adapter_state(run.model))

    def from_base() -> Any:
        return adapt(build_model(run.settings, tokenizer=run.tokenizer), run.settings)

    with quiet_libraries(), shared_folder(run.folder / MERGED_MODEL, run.processes) as partial:
        if run.processes.is_main:
            # Into the base as it is, not into 4 bits: a merged model computes what its adapter folder does.
            quantized = run.settings.lora.quantize != "none"
            adapted = from_base() if quantized else run.states.detached(run.model, from_base)
            load_adapter_state(adapted, state)
            merge(adapted).save_pretrained(partial)
            run.tokenizer.save_pretrained(partial)


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
        ValueError: a file is damaged; the message names it.
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
        if not Path(os.path.realpath(path)).is_relative_to(root):  # `resolve` raises for a link to itself
            raise ValueError(f"{name} lies outside its folder")
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        try:
            matches = file_hash(path) == expected
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        if not matches:
            raise ValueError(f"{name} does not match its hash")
    return state
