"""Everything a run needs, built and checked before the first step."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dtfcli.cost.peak import matmul_peak
from dtfcli.data.documents import OnProgress
from dtfcli.data.prepare import TokenizedData, prepare_data
from dtfcli.errors import ConfigError, DataError, DTFError
from dtfcli.loading.adapters import adapt
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.loading.devices import compute_dtype
from dtfcli.loading.quantization import check_nf4, quantize_nf4
from dtfcli.runs.files import MetricsLog, tidy_folders
from dtfcli.runs.folder import CHECKPOINTS, FINAL_MODEL, METRICS_FILE, create_run_folder, new_run_folder
from dtfcli.settings import Settings
from dtfcli.training.activation_checkpointing import checkpoint_activations
from dtfcli.training.checkpoint import find_checkpoint
from dtfcli.training.compiling import compile_layers
from dtfcli.training.distillation import Distillation, dense_parent
from dtfcli.training.distributed import Replicated, Sharded, connect
from dtfcli.training.events import TrainEvent, TrainListener
from dtfcli.training.fitting import fit_routing
from dtfcli.training.interrupt import StopSignal
from dtfcli.training.liger import check_liger, use_liger
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import build_optimizer, parameter_groups
from dtfcli.training.plan import for_processes, plan_run
from dtfcli.training.rows import step_rows
from dtfcli.training.run import Run, TrainingState
from dtfcli.training.trackers import Trackers, check_trackers


def setup(settings: Settings, resume: Path | None, rename: bool, emit: TrainListener, stop: StopSignal) -> Run:
    """Build everything, check what can be checked, and make or reopen the run folder."""
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
    if resume is None and states.needs_weights and hasattr(model, "fit_routing"):
        fit_routing(settings, model, data.train, processes.device, progress)

    torch.manual_seed(settings.run.seed + processes.rank)  # each drops out other numbers
    distillation = _distillation(settings, model, processes.device)
    _adapt(settings, model, processes.device)
    states.prepare(_objective(settings, model, distillation, warn), lambda: _optimizer(settings, model))

    state = TrainingState(data=data.fingerprint, processes=processes.world_size)
    if resume is None:
        processes.from_main(lambda: create_run_folder(folder, settings))
    else:
        state = _restore(folder, states, state, emit)
    trackers = Trackers(warn)
    processes.from_main(lambda: _start_trackers(trackers, settings, folder, state, is_new=resume is None))
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
        model = _built(settings, tokenizer, meta=not states.needs_weights, progress=progress)
        data = prepare_data(settings.data, tokenizer, seed=settings.run.seed, on_progress=progress)
    return tokenizer, model, data


def _built(settings: Settings, tokenizer: Any, *, meta: bool, progress: OnProgress) -> Any:
    """The model, which is to take rows as long as the settings say."""
    progress("Building the model", None)
    model = build_model(settings, tokenizer=tokenizer, meta=meta)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and settings.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len = {settings.data.seq_len}: {settings.model.base} was made for at most {longest} tokens."
        )
    return model


def _start_trackers(trackers: Trackers, settings: Settings, folder: Path, state: TrainingState, is_new: bool) -> None:
    try:
        trackers.start(settings, folder, step=state.step, resumed=not is_new)
    except DTFError:
        if is_new:  # a run that never began
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _distillation(settings: Settings, model: Any, device: torch.device) -> Distillation | None:
    if not settings.distill.enabled:
        return None
    model.to(device)  # before the parent is made, which may share its tensors
    dtype = compute_dtype(settings.run.dtype, device)
    return Distillation(dense_parent(model, share=settings.shares_parent, dtype=dtype), settings.distill)


def _adapt(settings: Settings, model: Any, device: torch.device) -> None:
    """Freeze and adapt the backbone if the settings say so; fit and parent are made before, of the plain base."""
    if settings.lora.quantize == "nf4":
        quantize_nf4(model, device, compute_dtype(settings.run.dtype, device))
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        adapt(model, settings)


def _objective(
    settings: Settings, model: Any, distillation: Distillation | None, warn: Callable[[str], None]
) -> Objective:
    if settings.training.gradient_checkpointing:
        checkpoint_activations(model, selective=settings.training.gradient_checkpointing == "selective")
    if settings.training.kernels == "liger":
        left = use_liger(model)
        if left:
            warn(f"training.kernels = 'liger': torch runs {', '.join(left)}, for which Liger has no kernel.")
    if settings.training.compile:
        compile_layers(model)
    return Objective(model, distillation)


def _optimizer(settings: Settings, model: Any) -> torch.optim.AdamW:
    training = settings.training
    groups = parameter_groups(
        model.named_parameters(),
        training.learning_rates.model_dump(),
        training.weight_decay,
        training.decay_router_scalars,
    )
    return build_optimizer(groups, (training.betas[0], training.betas[1]))


def _restore(folder: Path, states: Replicated, start: TrainingState, emit: TrainListener) -> TrainingState:
    """Load the newest undamaged checkpoint; without any, the run begins again."""

    def find() -> tuple[Path, TrainingState] | None:
        tidy_folders(folder)
        tidy_folders(folder / CHECKPOINTS)
        return find_checkpoint(folder, lambda message: emit(TrainEvent("warning", message)))

    usable = states.processes.from_main(find)
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
