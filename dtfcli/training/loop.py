"""A training run, top to bottom: setup (in its own file) → fit → finish.

The notable choices:

- `accelerate` owns device, autocast and gradient reduction; accumulation is done by hand, because a mean over the
  whole update (and not over each micro-batch) is what one large batch would give.
- The order of the data and the learning rates are pure functions of the step; together with weights, optimizer and
  random generators in a checkpoint, a resumed run repeats the undisturbed one exactly.
- `train/loss` and `val/loss` are the language-model loss alone. `val/loss` is measured causally, with thresholds
  that were calibrated on training text.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtfcli.cost.accounting import training_step_flops
from dtfcli.data.hub import SourceLost
from dtfcli.data.targets import count_targets
from dtfcli.errors import DTFError
from dtfcli.loading.adapters import adapter_state, is_adapted, load_adapter_state, read_adapter
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import CURVES_FILE, MERGED_MODEL, list_checkpoints, locked
from dtfcli.settings import Settings
from dtfcli.training.after import evaluate_final, plan_evaluation
from dtfcli.training.curriculum import annealed_capacity, annealing_left, freeze_backbone
from dtfcli.training.curves import draw_curves
from dtfcli.training.failures import explained_failures
from dtfcli.training.interrupt import StopRequested, StopSignal
from dtfcli.training.optim import GROUPS, schedule_factor, set_learning_rates
from dtfcli.training.plan import Plan
from dtfcli.training.processes import is_main_process
from dtfcli.training.publishing import is_logged_in, push_final_model
from dtfcli.training.saving import checkpoint, save_merged, save_model
from dtfcli.training.setup import Run, setup
from dtfcli.training.sharding import Sharded
from dtfcli.training.tracking import Event, Listener
from dtfcli.training.validation import calibration_batches, to_batch, to_labels, validate

_CURVES_EVERY_SECONDS = 30.0
_QUICK_CALIBRATION_TOKENS = 4096


class TrainingInterrupted(DTFError):
    """The run was stopped by a signal; its checkpoint is saved."""

    exit_code = 130


class TrainingDiverged(DTFError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        run_dir: the run folder.
        final_model_path, best_model_path: model folders, with LoRA adapter folders; no best one without validation
            text.
        steps: updates done.
        metrics: of the last evaluation, by the names of metrics.jsonl, `val/unigram` included.
        best_step, best_val_loss: of the best evaluation.
        prompt, sample: a few tokens of validation text and how the model goes on.
        evaluation: the scores of `eval.after`.
        hub_url: of the repository that the final model was pushed to.
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


def train(
    settings: Settings, *, resume: Path | None = None, rename: bool = False, on_event: Listener | None = None
) -> TrainResult:
    """Train a model as the settings say.

    Args:
        settings: of the run; when resuming, those from its folder (`runs.run_settings`).
        resume: the folder of a run to go on with.
        rename: give a new run another name when its own is taken, instead of refusing.
        on_event: called with every `Event`.

    Raises:
        TrainingInterrupted: by Ctrl-C or SIGTERM, after a checkpoint was saved.
        TrainingDiverged: the loss became infinite or NaN; the last good checkpoint is kept.
        ConfigError, DataError, CheckpointError, HubError: the input is wrong.
        DTFError: the run folder cannot be written.
    """
    emit = on_event if on_event and is_main_process() else _tell_nobody
    evaluation = plan_evaluation(settings)
    stop = StopSignal(lambda: emit(Event("warning", "Stopping after this step; Ctrl-C again stops at once.")))
    with explained_failures(settings), ExitStack() as held:
        if resume is not None and is_main_process():
            held.enter_context(locked(resume))
        run = setup(settings, resume, rename, emit, stop)
        if resume is None and run.processes.is_main:
            held.enter_context(locked(run.folder))
        with stop:
            try:
                fit(run)
                run.rows.close()
                result = finish(run)
            except StopRequested:
                folder = checkpoint(run)
                _draw_curves(run, at_once=True)
                run.processes.wait()
                raise TrainingInterrupted(
                    f"Interrupted at step {run.state.step} of {run.plan.total_steps}, saved as {folder}. "
                    f"Go on with: dtf train --resume {run.folder}"
                ) from None
            except SourceLost as error:
                alone = run.processes.count == 1  # others may be in the middle of a step
                saved = f"step {run.state.step} is saved as {checkpoint(run)}" if alone else "stopped"
                raise SourceLost(f"{error} The run: {saved}. Go on with: dtf train --resume {run.folder}") from error
            finally:
                run.rows.close()
                run.trackers.finish()
        run.processes.leave()
    if not run.processes.is_main:
        return result
    if evaluation is not None:
        result = replace(result, evaluation=evaluate_final(settings, evaluation, run.folder, emit))
    # After the benchmarks, so that the card shows them.
    merged = result.run_dir / MERGED_MODEL
    pushed = merged if merged.exists() else result.final_model_path
    return replace(result, hub_url=push_final_model(settings.hub, pushed, emit))


def _tell_nobody(event: Event) -> None:
    """The listener of processes that are not the main one."""


def fit(run: Run) -> None:
    """Update the weights until all steps are done; evaluate, log and save on the way."""
    plan, state = run.plan, run.state
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in run.model.parameters()]
    sizes = {"parameters": sum(n for n, _ in parameters), "trainable": sum(n for n, trained in parameters if trained)}
    run.tell("start", str(run.folder), metrics=sizes)
    if run.settings.hub.repo and not is_logged_in():
        run.tell("warning", f"hub.repo = {run.settings.hub.repo!r}: not logged in; run `hf auth login` meanwhile.")
    while state.step < plan.total_steps:
        run.stop.check()
        if state.step % plan.eval_every == 0 and state.evaluated_step != state.step:
            evaluate(run)
        run.stop.check()
        run.watch.start()
        losses = update(run)
        run.watch.stop(plan.tokens_per_update)
        state.step += 1
        log_step(run, losses)
        if state.step % plan.checkpoint_every == 0 and state.step < plan.total_steps:
            checkpoint(run)


def update(run: Run) -> dict[str, Any]:
    """One optimizer step over `rows_per_update` rows, in micro-batches.

    Returns:
        Metrics of the update: losses averaged over all of it, gradient norm, learning rates and, when the step is
        logged, routing statistics.

    Raises:
        TrainingDiverged: a loss or the gradient is not finite; the weights are still those before the step.
    """
    plan, step = run.plan, run.state.step
    factor = schedule_factor(step, plan.total_steps, plan.warmup_steps, run.settings.training.schedule)
    rates = set_learning_rates(run.optimizer.param_groups, factor)
    # Several processes decide together whether to stop, not each while it waits for text.
    rows = run.rows.take(step, run.stop.check if run.processes.count == 1 else _never_stop)
    # Gradients and losses are averaged over processes afterwards: each sums up a mean over its part of the targets.
    targets = max(1, count_targets(rows)) / run.processes.count

    if run.objective.routed:
        _choose_training_routing(run)
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Any] = {}
    processes, states = run.processes, run.states
    parts = plan.micro_batches(rows, processes.rank, processes.count)
    with _training_capacity(run) as extra, states.converting_once():
        for place, part in enumerate(parts, 1):
            input_ids, labels = to_batch(part, processes.device), to_labels(part, processes.device)
            with states.accumulating(is_last=place == len(parts)):
                losses = states.trained(input_ids, targets, output_routing=_is_logged(plan, step + 1), labels=labels)
                states.backward(losses.loss)
            values = {
                "train/loss": losses.lm_loss,
                "train/prior_loss": losses.prior_loss,
                "train/router_loss": losses.router_loss,
                "train/distill_loss": losses.distill_loss,
                "train/hidden_loss": losses.hidden_loss,
                **(losses.routing or {}),
            }
            for name, value in values.items():
                if value is not None:
                    sums[name] = sums.get(name, 0.0) + value.detach()
    states.reduce_gradients()
    sums = processes.mean(sums)
    if run.objective.routed:
        _average_thresholds(run)
    if step < run.settings.training.router_warmup_steps:
        freeze_backbone(run.optimizer.param_groups)
        rates["base"] = 0.0
    metrics = {"train/loss": sums.pop("train/loss").item(), "train/grad_norm": _clip_gradients(run)}
    _check_finite(run, metrics)
    run.optimizer.step()
    return metrics | sums | extra | {f"lr/{name}": rate for name, rate in rates.items()}


@contextmanager
def _training_capacity(run: Run) -> Iterator[dict[str, float]]:
    """Route by the γ of this update; gives the metric that tells it, where γ changes in the course of the run."""
    training = run.settings.training
    if not run.objective.routed or training.capacity_schedule == "constant":
        yield {}
        return
    left = annealing_left(run.state.step, run.plan.total_steps, training)
    with annealed_capacity(run.model, left, training.capacity_start) as capacity:
        yield {"train/capacity": capacity}


def _average_thresholds(run: Run) -> None:
    """Give all processes the mean of the thresholds that each has tracked on its own rows."""
    if run.processes.count > 1:
        tracked = [router.thresholds for router in run.model.model.routers.values()]
        together = torch.stack([thresholds[0] for thresholds in tracked])
        run.processes.average(together)
        for thresholds, mean in zip(tracked, together, strict=True):
            thresholds[0] = mean


def _never_stop() -> None:
    """Wait on."""


def _choose_training_routing(run: Run) -> None:
    """Top-K, and for the last `training.threshold_fraction` of the updates the rule of inference."""
    first = run.plan.total_steps - round(run.settings.training.threshold_fraction * run.plan.total_steps)
    if run.state.step == first:
        calibrate(run, capacities=(), tokens=_QUICK_CALIBRATION_TOKENS)
    run.model.set_training_routing("topk" if run.state.step < first else "threshold")


def _clip_gradients(run: Run) -> float:
    """Clip each learning-rate group by its own norm; returns the norm of all gradients together.

    A common norm would let the prior loss, whose scale is that of the surprise (a hundred times the language model's
    in small models), throttle the backbone's steps.
    """
    squares = 0.0
    run.accelerator.unscale_gradients()  # once for all groups: float16's loss scaling refuses a second time
    for name in GROUPS:
        members = [p for group in run.optimizer.param_groups if group["name"] == name for p in group["params"]]
        if members:
            squares += run.states.clip(members, run.settings.training.gradient_clip) ** 2
    return math.sqrt(squares)


def log_step(run: Run, losses: dict[str, Any]) -> None:
    """Tell the listener about an update and, on logging steps, write its line."""
    if not _is_logged(run.plan, run.state.step):
        run.tell("step", metrics={"train/loss": losses["train/loss"]})
        return
    rate = run.watch.take_rate()
    flops = training_step_flops(run.model, run.plan.seq_len) * rate
    line: dict[str, Any] = {"step": run.state.step, "tokens": run.tokens}
    line |= {name: value.item() if torch.is_tensor(value) else value for name, value in losses.items()}
    if run.objective.routed:
        for layer, scalars in run.model.router_scalars().items():
            line |= {f"router/{layer}/{name}": value for name, value in scalars.items()}
    peak = run.peak_flops * run.processes.count if run.peak_flops else None
    line |= {"tokens_per_second": rate, "mfu": flops / peak if peak else None}
    line = _without_nan(line)
    run.log.write(line)
    run.tell("step", metrics=line)


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no such number."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}


def evaluate(run: Run) -> dict[str, float]:
    """Measure the held-out losses, write their line, and keep the model if it is the best so far."""
    with _evaluation_thresholds(run):
        return _evaluate(run)


@contextmanager
def _evaluation_thresholds(run: Run) -> Iterator[None]:
    """On the way, thresholds calibrated for an evaluation; afterwards again those that training tracks.

    The averages that training tracks lag behind while the scores still move: they routed anything from nothing to
    everything. At the end `finish` has calibrated already.
    """
    if not (run.objective.routed and len(run.validation) and run.state.step < run.plan.total_steps):
        yield
        return
    tracked = {layer: router.thresholds[0].clone() for layer, router in run.model.model.routers.items()}
    try:
        calibrate(run, capacities=(), tokens=_QUICK_CALIBRATION_TOKENS)
        yield
    finally:
        if run.state.step:  # before the first update nothing was tracked
            for layer, router in run.model.model.routers.items():
                router.thresholds[0] = tracked[layer]


def _evaluate(run: Run) -> dict[str, float]:
    state = run.state
    metrics: dict[str, Any] = {}
    if len(run.validation):
        run.tell("phase", "Evaluating")
        metrics = validate(
            run.objective,
            run.validation,
            batch_size=run.plan.micro_batch_size,
            bytes_per_token=run.data.validation_bytes_per_token,
            device=run.accelerator.device,
            between=run.stop.between,
            processes=run.processes,
        )
        _check_finite(run, {"val/loss": metrics["val/loss"]})
        once = {"val/unigram": run.data.validation_unigram} if state.evaluated_step < 0 else {}
        run.log.write(_without_nan({"step": state.step, "tokens": run.tokens, **metrics, **once}))
        if state.step > 0 and (state.best_loss is None or metrics["val/loss"] < state.best_loss):
            state.best_step, state.best_loss = state.step, metrics["val/loss"]
            save_model(run, "best_model")
        run.tell("evaluation", metrics={**metrics, "val/unigram": run.data.validation_unigram})
    state.evaluated_step = state.step
    _draw_curves(run)
    return metrics


def calibrate(run: Run, capacities: tuple[float, ...] | None = None, tokens: int | None = None) -> None:
    """Measure thresholds on training text.

    Args:
        run: with a routed model.
        capacities: (): at the model's own capacity alone; None: on the whole grid.
        tokens: of text, at most; None: `training.calibration_tokens`.
    """
    run.tell("phase", "Calibrating thresholds")
    most = run.settings.training.calibration_tokens
    batches = calibration_batches(
        run.data.train, min(most, tokens or most), run.plan.micro_batch_size, run.settings.run.seed
    )
    # In the precision that the losses are measured in: thresholds are quantiles of its scores.
    with run.accelerator.autocast(), run.states.outside():
        run.model.calibrate(batches, capacities=capacities)
    run.processes.share([table for name, table in run.model.named_buffers() if "thresholds" in name])


def finish(run: Run) -> TrainResult:
    """Calibrate, evaluate for the last time, see what the model writes, and save it: the end of a run."""
    checkpoint(run)  # what follows takes a while, and disks fill up
    if run.objective.routed:
        calibrate(run)
    metrics = evaluate(run)
    prompt, sample = write_sample(run)
    best = run.folder / "best_model"
    if run.objective.routed and 0 <= run.state.best_step < run.state.step:
        _complete_best_model(run)
    _draw_curves(run, at_once=True)
    if run.settings.lora.enabled and run.settings.lora.merge:
        save_merged(run)
    # Last of all, because a run that has its final model is finished and cannot be resumed.
    final = save_model(run, "final_model")
    run.tell("end", str(final))
    return TrainResult(
        run_dir=run.folder,
        final_model_path=final,
        best_model_path=best if best.exists() else None,
        steps=run.state.step,
        metrics=metrics | ({"val/unigram": run.data.validation_unigram} if metrics else {}),
        best_step=run.state.best_step,
        best_val_loss=run.state.best_loss,
        prompt=prompt,
        sample=sample,
    )


def _complete_best_model(run: Run) -> None:
    """Calibrate a best model from the way, saved with thresholds of its own capacity alone, for any capacity."""
    best, adapted = run.folder / "best_model", is_adapted(run.model)
    state = run.states.whole(adapter_state(run.model)) if adapted else run.model.state_dict()
    final = {name: tensor.clone() for name, tensor in state.items()}
    if adapted:
        load_adapter_state(run.model, read_adapter(best))
    else:
        run.states.load_weights(best)
    calibrate(run)
    save_model(run, "best_model")
    if adapted:
        load_adapter_state(run.model, final)
    else:
        run.model.load_state_dict(final)


def write_sample(run: Run, prompt_tokens: int = 16, new_tokens: int = 48) -> tuple[str, str]:
    """The beginning of a validation row, and how the model goes on at a low temperature; both as text."""
    rows = run.validation if len(run.validation) else run.data.train
    prompt = to_batch(np.asarray(rows[:1, :prompt_tokens]), run.accelerator.device)
    run.tell("phase", "Writing a sample")
    run.objective.eval()
    torch.manual_seed(run.settings.run.seed)
    with run.accelerator.autocast(), run.states.outside(), _causal_routing(run.model, run.objective.routed):
        written = run.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.5,
            synced_gpus=isinstance(run.states, Sharded),  # where each needs the others, nobody stops before them
        )[0]
    split = prompt.shape[1]
    return run.tokenizer.decode(written[:split]), run.tokenizer.decode(written[split:], skip_special_tokens=True)


@contextmanager
def _causal_routing(model: Any, routed: bool) -> Iterator[None]:
    if not routed:
        yield
        return
    with model.routing_mode(model.causal_routing):
        yield


def _draw_curves(run: Run, at_once: bool = False) -> None:
    """Redraw curves.png, now and then: a picture takes about as long as some updates."""
    if not run.processes.is_main:
        return
    if at_once or time.monotonic() - run.curves_drawn_at > _CURVES_EVERY_SECONDS:
        draw_curves(read_metrics(run.log.path), run.folder / CURVES_FILE, run.settings.run.name)
        run.curves_drawn_at = time.monotonic()


def _is_logged(plan: Plan, step: int) -> bool:
    return step % plan.log_every == 0 or step in (1, plan.total_steps)


def _check_finite(run: Run, values: dict[str, float]) -> None:
    # Loss scaling in float16 meets infinite gradients now and then, and skips those steps itself.
    scaled = run.accelerator.scaler is not None
    for name, value in values.items():
        if math.isfinite(value) or (scaled and name == "train/grad_norm"):
            continue
        kept = list_checkpoints(run.folder)
        last = f"The last good checkpoint is kept: {kept[0]}." if kept else "There was no checkpoint yet."
        raise TrainingDiverged(
            f"{name} became {value} at step {run.state.step + 1}. {last} Start again with lower "
            "training.learning_rates, a longer training.warmup_ratio, or run.dtype=float32."
        )
