"""What a run leaves on disk: checkpoints to go on from, and model folders to use.

Every process takes part in gathering what is spread over them; the main one alone writes.
"""

from pathlib import Path
from typing import Any

from dtfcli.loading.adapters import adapt, adapter_state, is_adapted, load_adapter_state, merge, save_adapter
from dtfcli.loading.build import build_model
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import shared_folder
from dtfcli.runs.folder import MERGED_MODEL
from dtfcli.training.checkpoint import save_checkpoint
from dtfcli.training.setup import Run


def checkpoint(run: Run) -> Path:
    """Everything that going on needs, in a checkpoint of this step."""
    run.state.metrics_bytes, run.state.stream = run.log.bytes, run.rows.state()
    with quiet_libraries():
        folder = save_checkpoint(
            run.states, run.folder, run.state, run.settings.training.keep_checkpoints, run.processes
        )
    run.tell("checkpoint", str(folder))
    return folder


def save_model(run: Run, name: str) -> Path:
    """A model folder: weights in float32, configuration, tokenizer and, for routed models, their code.

    With LoRA an adapter folder.
    """
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
