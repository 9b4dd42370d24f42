"""Everything a run needs, built and checked before the first step."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from dtfcli.data import TokenizedData, prepare_data
from dtfcli.devices import compute_dtype, resolve_device
from dtfcli.errors import ConfigError, DataError
from dtfcli.factory import build_model, build_tokenizer
from dtfcli.settings import Settings
from dtfcli.training.checkpoint import TrainingState, find_checkpoint, load_checkpoint, tidy_folders
from dtfcli.training.compiling import compile_layers
from dtfcli.training.interrupt import StopSignal
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import build_optimizer, parameter_groups
from dtfcli.training.plan import Plan, plan_run
from dtfcli.training.runs import METRICS_FILE, create_run_folder, new_run_folder
from dtfcli.training.tracking import Event, Listener, MetricsLog, Stopwatch, matmul_peak
from dtfcli.training.validation import evaluation_rows

_MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Run:
    """Everything that a running run needs."""

    settings: Settings
    plan: Plan
    folder: Path
    accelerator: Accelerator
    objective: Any
    model: Any
    optimizer: Any
    tokenizer: Any
    data: TokenizedData
    log: MetricsLog
    state: TrainingState
    emit: Listener
    stop: StopSignal
    peak_flops: float | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    curves_drawn_at: float = field(default_factory=time.monotonic)

    @cached_property
    def validation(self) -> np.ndarray:
        """int32 [N, T]: the rows of every evaluation; none without validation text."""
        return evaluation_rows(self.data.validation, self.settings.data.validation_blocks)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.state.step * self.plan.tokens_per_update

    def tell(self, kind: Any, message: str = "", metrics: dict[str, Any] | None = None) -> None:
        """Emit an event of this step."""
        self.emit(Event(kind, message, self.state.step, self.plan.total_steps, metrics=metrics or {}))


def setup(settings: Settings, resume: Path | None, rename: bool, emit: Listener, stop: StopSignal) -> Run:
    """Build everything, check what can be checked, and make or reopen the run folder."""
    if resume is not None and (resume / "final_model").exists():
        raise ConfigError(f"--resume {resume}: this run has finished; its model is {resume / 'final_model'}.")
    folder = resume or new_run_folder(settings, rename=rename)
    accelerator = _accelerator(settings)

    def progress(message: str, fraction: float | None) -> None:
        emit(Event("phase", message, fraction=fraction))

    progress("Preparing the tokenizer", None)
    tokenizer = build_tokenizer(settings, on_progress=progress)
    progress("Building the model", None)
    model = build_model(settings, tokenizer=tokenizer)
    _check_length(settings, model)
    data = prepare_data(settings.data, tokenizer, seed=settings.run.seed, on_progress=progress)
    plan = plan_run(settings, len(data.train))
    assert plan is not None, "known once the rows are"

    torch.manual_seed(settings.run.seed)
    objective = _objective(settings, model).to(accelerator.device)
    training = settings.training
    groups = parameter_groups(
        model.named_parameters(),
        training.learning_rates.model_dump(),
        training.weight_decay,
        training.decay_router_scalars,
    )
    optimizer = build_optimizer(groups, (training.betas[0], training.betas[1]))
    objective, optimizer = accelerator.prepare(objective, optimizer)

    state = TrainingState(data=data.fingerprint)
    if resume is None:
        create_run_folder(folder, settings)
    else:
        state = _restore(folder, accelerator, state, emit)
    return Run(
        settings=settings,
        plan=plan,
        folder=folder,
        accelerator=accelerator,
        objective=objective,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        data=data,
        log=MetricsLog(folder / METRICS_FILE, keep_bytes=state.metrics_bytes),
        state=state,
        emit=emit,
        stop=stop,
        peak_flops=matmul_peak(accelerator.device, compute_dtype(settings.run.dtype, accelerator.device)),
    )


def _accelerator(settings: Settings) -> Accelerator:
    device = resolve_device(settings.run.device)
    dtype = compute_dtype(settings.run.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError("run.dtype = 'float16': the CPU does not train in it; use bfloat16, float32 or auto.")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    # accelerate keeps one state per process and refuses another precision: a second run starts afresh.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(mixed_precision=_MIXED_PRECISION[dtype], cpu=device.type == "cpu")


def _objective(settings: Settings, model: Any) -> Objective:
    if settings.training.gradient_checkpointing:
        # Named so from Transformers 5.20 or so on, where the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if settings.training.compile:
        compile_layers(model)
    return Objective(model)


def _check_length(settings: Settings, model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and settings.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len = {settings.data.seq_len}: {settings.model.base} was made for at most {longest} tokens."
        )


def _restore(folder: Path, accelerator: Accelerator, start: TrainingState, emit: Listener) -> TrainingState:
    """Load the newest undamaged checkpoint; without any, the run begins again."""
    tidy_folders(folder)
    tidy_folders(folder / "checkpoints")
    found = find_checkpoint(folder, lambda message: emit(Event("warning", message)))
    if found is None:
        emit(Event("warning", f"{folder} has no usable checkpoint: starting from the beginning."))
        return start
    checkpoint, state = found
    if state.data != start.data:
        raise DataError(
            f"{folder}: data.sources have changed since this run began, so it cannot be resumed. Start a new run."
        )
    load_checkpoint(accelerator, checkpoint)
    emit(Event("phase", f"Resuming from {checkpoint}"))
    return state
