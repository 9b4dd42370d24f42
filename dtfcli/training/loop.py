"""A training run, top to bottom: setup (in its own file) → fit → finish.

The notable choices:

- `accelerate` owns device, autocast and gradient reduction; `step.py` accumulates by hand.
- The order of the data and the learning rates are pure functions of the step; together with weights, optimizer and
  random generators in a checkpoint, a resumed run repeats the undisturbed one exactly.
- `train/loss` and `val/loss` are the language-model loss alone. `val/loss` is measured causally, with thresholds
  that were calibrated on training text.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dtfcli.cost.accounting import training_step_flops
from dtfcli.data.hub import SourceLost
from dtfcli.errors import DTFError
from dtfcli.loading.quantization import numel
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import BEST_MODEL, CURVES_FILE, FINAL_MODEL, locked
from dtfcli.settings import Settings
from dtfcli.training.calibrate import calibrate, complete_best_model, evaluation_thresholds
from dtfcli.training.checkpoint import checkpoint, save_merged, save_model
from dtfcli.training.curriculum import phase_of
from dtfcli.training.curves import draw_curves
from dtfcli.training.distributed import Sharded, is_main_process
from dtfcli.training.events import PhaseTimes, TrainEvent, TrainListener
from dtfcli.training.failures import explained_failures
from dtfcli.training.interrupt import StopRequested, StopSignal
from dtfcli.training.run import Run
from dtfcli.training.setup import setup
from dtfcli.training.step import check_finite, is_logged, train_step
from dtfcli.training.validation import to_batch, validate

_CURVES_EVERY_SECONDS = 30.0


class TrainingInterrupted(DTFError):
    """The run was stopped by a signal; its checkpoint is saved."""

    exit_code = 130


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        run_dir: the run folder.
        final_model_path, best_model_path: model or adapter folders; no best one without validation text.
        steps: steps made.
        metrics: of the last evaluation, by the names of metrics.jsonl, `val/unigram` included.
        best_step, best_val_loss: of the best evaluation.
        prompt, sample: a few tokens of validation text and the model's continuation.
        evaluation: the file with the scores of `eval.after`.
        hub_url: the repository that the final model was pushed to.
        seconds: how long each phase took, by its name; of a resumed run since then.
    """

    run_dir: Path
    final_model_path: Path
    best_model_path: Path | None
    steps: int
    metrics: dict[str, float]
    best_step: int
    best_val_loss: float | None
    prompt: str
    sample: str
    evaluation: Path | None = None
    hub_url: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def train_model(settings: Settings, *, resume: Path | None, rename: bool, emit: TrainListener) -> TrainResult:
    """Train a model as the settings say; `experiment.train` describes the arguments and the errors."""
    emit = times = PhaseTimes(emit)
    stop = StopSignal(lambda: emit(TrainEvent("warning", "Stopping after this step; Ctrl-C again stops at once.")))
    with explained_failures(settings), ExitStack() as held:

        def lock(folder: Path) -> None:
            if is_main_process() and not held.enter_context(locked(folder)):
                emit(TrainEvent("warning", f"{folder}: its file system has no locks; let no other process resume it."))

        if resume is not None:
            lock(resume)
        run = setup(settings, resume, rename, emit, stop)
        if resume is None:
            lock(run.folder)
        with stop, _explained_stops(run):
            fit(run)
            run.rows.close()
            result = finish(run)
        run.processes.disconnect()
    return replace(result, seconds=times.seconds)


@contextmanager
def _explained_stops(run: Run) -> Iterator[None]:
    """Save a run that has to stop or has lost a source, and name the command that resumes it; close its streams."""
    try:
        yield
    except StopRequested:
        folder = checkpoint(run)
        _draw_curves(run, at_once=True)
        run.processes.barrier()
        raise TrainingInterrupted(
            f"Interrupted at step {run.state.step} of {run.plan.total_steps}, saved as {folder}. "
            f"Go on with: dtf train --resume {run.folder}"
        ) from None
    except SourceLost as error:
        alone = run.processes.world_size == 1  # others may be in the middle of a step
        saved = f"step {run.state.step} is saved as {checkpoint(run)}" if alone else "stopped"
        raise SourceLost(f"{error} The run: {saved}. Go on with: dtf train --resume {run.folder}") from error
    finally:
        run.rows.close()
        run.trackers.finish()


def fit(run: Run) -> None:
    """Train until all steps are done; evaluate, log and save on the way."""
    plan, state = run.plan, run.state
    parameters = [(numel(parameter), parameter.requires_grad) for parameter in run.model.parameters()]
    sizes = {"parameters": sum(n for n, _ in parameters), "trainable": sum(n for n, trained in parameters if trained)}
    run.report("start", str(run.folder), metrics=sizes)
    while state.step < plan.total_steps:
        run.stop.check()
        if state.step % plan.eval_every == 0 and state.evaluated_step != state.step:
            validate_run(run)
        run.stop.check()
        run.report("phase", phase_of(state.step, plan.total_steps, run.settings.training))
        run.watch.start()
        losses = train_step(run)
        run.watch.stop(plan.tokens_per_step)
        state.step += 1
        log_step(run, losses)
        if state.step % plan.checkpoint_every == 0 and state.step < plan.total_steps:
            checkpoint(run)


def log_step(run: Run, losses: dict[str, Any]) -> None:
    """Report a step to the listener and, on logging steps, write its line."""
    if not is_logged(run.plan, run.state.step):
        run.report("step", metrics={"train/loss": losses["train/loss"]})
        return
    rate = run.watch.take_rate()
    flops = training_step_flops(run.model, run.plan.seq_len)
    line: dict[str, Any] = {"step": run.state.step, "tokens": run.tokens}
    line |= {name: value.item() if torch.is_tensor(value) else value for name, value in losses.items()}
    for layer, scalars in run.model.router_scalars().items() if run.objective.routed else ():
        line |= {f"router/{layer}/{name}": value for name, value in scalars.items()}
    peak = run.peak_flops * run.processes.world_size if run.peak_flops else None
    line |= {"tokens_per_second": rate, "mfu": flops * rate / peak if peak and rate else None}
    run.report("step", metrics=run.log.write(line))


def validate_run(run: Run) -> dict[str, Any]:
    """Measure the held-out losses, write their line, and keep the model if it is the best so far."""
    state, metrics = run.state, dict[str, Any]()
    if len(run.validation):
        unigram = {"val/unigram": run.data.validation_unigram}
        with evaluation_thresholds(run):
            run.report("phase", "Evaluating")
            metrics = validate(run)
            check_finite(run, {"val/loss": metrics["val/loss"]})
            once = unigram if state.evaluated_step < 0 else {}
            run.log.write({"step": state.step, "tokens": run.tokens, **metrics, **once})
            if state.step > 0 and (state.best_loss is None or metrics["val/loss"] < state.best_loss):
                state.best_step, state.best_loss = state.step, metrics["val/loss"]
                save_model(run, BEST_MODEL)
        metrics |= unigram
        run.report("evaluation", metrics=metrics)
    state.evaluated_step = state.step
    _draw_curves(run)
    return metrics


def finish(run: Run) -> TrainResult:
    """End a run: calibrate, evaluate for the last time, write a sample, save the model."""
    checkpoint(run)  # the rest takes a while, and disks fill up
    if run.objective.routed:
        calibrate(run)
    metrics = validate_run(run)
    prompt, sample = write_sample(run)
    best = run.folder / BEST_MODEL
    if run.objective.blocks and 0 <= run.state.best_step < run.state.step:
        complete_best_model(run)
    _draw_curves(run, at_once=True)
    if run.settings.lora.enabled and run.settings.lora.merge:
        save_merged(run)
    # Last of all, because a run that has its final model is finished and cannot be resumed.
    final = save_model(run, FINAL_MODEL)
    run.report("end", str(final))
    return TrainResult(
        run_dir=run.folder,
        final_model_path=final,
        best_model_path=best if best.exists() else None,
        steps=run.state.step,
        metrics=metrics,
        best_step=run.state.best_step,
        best_val_loss=run.state.best_loss,
        prompt=prompt,
        sample=sample,
    )


def write_sample(run: Run, prompt_tokens: int = 16, new_tokens: int = 48) -> tuple[str, str]:
    """The beginning of a validation row, and the model's continuation at a low temperature; both as text."""
    rows = run.validation if len(run.validation) else run.data.train
    prompt, _ = to_batch(rows[:1, :prompt_tokens], run.accelerator.device)
    run.report("phase", "Writing a sample")
    run.objective.eval()
    torch.manual_seed(run.settings.run.seed)
    model = run.model
    causal = model.routing_mode(model.causal_routing) if run.objective.routed else nullcontext()
    with run.accelerator.autocast(), run.states.outside(), causal:
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.5,
            synced_gpus=isinstance(run.states, Sharded),  # each process needs the others, so none stops early
        )[0]
    split = prompt.shape[1]
    return run.tokenizer.decode(written[:split]), run.tokenizer.decode(written[split:], skip_special_tokens=True)


def _draw_curves(run: Run, at_once: bool = False) -> None:
    """Redraw curves.png every half minute: a picture takes about as long as some steps."""
    due = at_once or time.monotonic() - run.curves_drawn_at > _CURVES_EVERY_SECONDS
    if due and run.processes.is_main:
        draw_curves(read_metrics(run.log.path), run.folder / CURVES_FILE, run.settings.run.name)
        run.curves_drawn_at = time.monotonic()
