"""Everything a run needs, built and checked before the first step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dtfcli.cost.peak import matmul_peak
from dtfcli.data.documents import OnProgress
from dtfcli.data.prepare import TokenizedData, prepare_data
from dtfcli.errors import ConfigError, DataError
from dtfcli.loading.adapters import adapt
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.loading.devices import compute_dtype
from dtfcli.loading.quantization import check_nf4, quantize_nf4
from dtfcli.models.pretrained import is_routed
from dtfcli.models.stock import longest_text
from dtfcli.runs.files import MetricsLog, tidy_folders
from dtfcli.runs.folder import CHECKPOINTS, FINAL_MODEL, METRICS_FILE, create_run_folder, new_run_folder
from dtfcli.settings import Settings
from dtfcli.training.activation_checkpointing import checkpoint_activations
from dtfcli.training.calibrate import fit_routing
from dtfcli.training.checkpoint import find_checkpoint
from dtfcli.training.compiling import compile_layers
from dtfcli.training.distillation import Distillation, dense_parent
from dtfcli.training.distributed import Replicated, Sharded, connect
from dtfcli.training.events import TrainEvent, TrainListener
from dtfcli.training.interrupt import StopSignal
from dtfcli.training.liger import check_liger, use_liger
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import build_optimizer
from dtfcli.training.plan import for_processes, plan_run
from dtfcli.training.rows import step_rows
from dtfcli.training.run import Run, TrainingState
from dtfcli.training.trackers import Trackers, check_trackers
from dtfcli.training.validation import evaluation_rows


def setup(settings: Settings, resume: Path | None, rename: bool, emit: TrainListener, stop: StopSignal) -> Run:
    """Build everything, check it as far as possible, and make or reopen the run folder."""
    if resume is not None and (resume / FINAL_MODEL).exists():
        raise ConfigError(f"--resume {resume}: this run has finished; its model is {resume / FINAL_MODEL}.")
    check_trackers(settings)
    accelerator, processes = connect(settings)
    check_liger(settings.training.kernels, processes.device)
    if settings.lora.quantize == "nf4":
        check_nf4()
    settings = for_processes(settings, processes.world_size)
    stop.agree = processes.any_rank
    folder = processes.from_main(lambda: resume or new_run_folder(settings, rename=rename))

    def progress(message: str, fraction: float | None) -> None:
        emit(TrainEvent("phase", message, fraction=fraction))

    def warn(message: str) -> None:
        emit(TrainEvent("warning", message))

    states = (Sharded if settings.training.sharding == "fsdp2" else Replicated)(accelerator, processes)
    tokenizer, model, data = _materials(settings, accelerator, states, progress)
    plan = plan_run(settings, len(data.train))
    assert plan is not None, "known once the rows are"
    usable = None if resume is None else _usable_checkpoint(folder, states, emit)
    if usable is None and states.needs_weights and is_routed(model):
        fit_routing(settings, model, data.train, processes.device, progress)

    torch.manual_seed(settings.run.seed + processes.rank)  # each drops out other numbers
    states.prepare(
        _objective(settings, model, processes.device, warn), lambda: build_optimizer(model, settings.training)
    )

    state = TrainingState(data=data.fingerprint, processes=processes.world_size)
    if resume is None:
        processes.from_main(lambda: create_run_folder(folder, settings))
    else:
        state = _restore(folder, usable, states, state, emit)
    trackers = Trackers(warn)
    processes.from_main(lambda: trackers.start(settings, folder, step=state.step, resumed=resume is not None))
    return Run(
        settings=settings,
        plan=plan,
        folder=folder,
        accelerator=accelerator,
        processes=processes,
        states=states,
        objective=states.objective,
        model=model,
        optimizer=states.optimizer,
        tokenizer=tokenizer,
        data=data,
        validation=evaluation_rows(data.validation, settings.data.validation_blocks),
        rows=step_rows(settings, data, tokenizer, plan.rows_per_step, state.stream, warn),
        trackers=trackers,
        log=MetricsLog(folder / METRICS_FILE, state.metrics_bytes, writes=processes.is_main, on_line=trackers.log),
        state=state,
        emit=emit,
        stop=stop,
        peak_flops=matmul_peak(accelerator.device, compute_dtype(settings.run.dtype, accelerator.device)),
    )


def _materials(
    settings: Settings, accelerator: Accelerator, states: Replicated, progress: OnProgress
) -> tuple[Any, Any, TokenizedData]:
    """Tokenizer, model and tokenized text."""
    # The first process of a machine fills the caches, the others read them.
    with accelerator.local_main_process_first():
        progress("Preparing the tokenizer", None)
        tokenizer = build_tokenizer(settings, on_progress=progress)
        progress("Building the model", None)
        model = build_model(settings, tokenizer=tokenizer, meta=not states.needs_weights)
        longest, length = longest_text(model.config), settings.data.seq_len
        if length > longest:
            raise ConfigError(f"data.seq_len = {length}: {settings.model.base} was made for at most {longest} tokens.")
        data = prepare_data(settings.data, tokenizer, seed=settings.run.seed, on_progress=progress)
    return tokenizer, model, data


def _objective(settings: Settings, model: Any, device: torch.device, warn: Callable[[str], None]) -> Objective:
    """The losses around a model that is frozen, adapted and compiled as the settings say."""
    training, dtype = settings.training, compute_dtype(settings.run.dtype, device)
    distillation = None
    if settings.distill.enabled:  # the parent is the plain base, so it is made first
        model.to(device)  # the parent may share its tensors
        distillation = Distillation(dense_parent(model, share=settings.shares_parent, dtype=dtype), settings.distill)
    if settings.lora.quantize == "nf4":
        quantize_nf4(model, device, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        adapt(model, settings)
    if training.gradient_checkpointing:
        checkpoint_activations(model, selective=training.gradient_checkpointing == "selective")
    if training.kernels == "liger" and (left := use_liger(model)):
        warn(f"training.kernels = 'liger': torch runs {', '.join(left)}, for which Liger has no kernel.")
    if training.compile:
        compile_layers(model)
    return Objective(model, distillation)


def _usable_checkpoint(folder: Path, states: Replicated, emit: TrainListener) -> tuple[Path, TrainingState] | None:
    """The newest undamaged checkpoint."""

    def find() -> tuple[Path, TrainingState] | None:
        tidy_folders(folder)
        tidy_folders(folder / CHECKPOINTS)
        return find_checkpoint(folder, lambda message: emit(TrainEvent("warning", message)))

    return states.processes.from_main(find)


def _restore(
    folder: Path,
    usable: tuple[Path, TrainingState] | None,
    states: Replicated,
    start: TrainingState,
    emit: TrainListener,
) -> TrainingState:
    """Load a checkpoint; without any, the run begins again."""
    if usable is None:
        emit(TrainEvent("warning", f"{folder} has no usable checkpoint: starting from the beginning."))
        return start
    checkpoint, state = usable
    if states.processes.from_main(lambda: state.data != start.data):
        raise DataError(
            f"{folder}: data.sources have changed since this run began, so it cannot be resumed. Start a new run."
        )
    if state.processes != start.processes:
        message = f"{state.processes} processes have trained this run and {start.processes} go on: not bit for bit."
        emit(TrainEvent("warning", message))
    states.load(checkpoint)
    emit(TrainEvent("phase", f"Resuming from {checkpoint}"))
    return replace(state, processes=start.processes)
