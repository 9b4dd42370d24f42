"""One optimizer step: micro-batches → gradients → clipping → optimizer → metrics.

Accumulation is done by hand: the loss is a mean over the whole step, not over each micro-batch, as one large batch
would have it.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from dtfcli.data.targets import count_targets
from dtfcli.errors import DTFError
from dtfcli.runs.folder import list_checkpoints
from dtfcli.training.calibrate import QUICK_CALIBRATION_TOKENS, calibrate, follow_scores
from dtfcli.training.curriculum import annealed_capacity, annealing_left, first_by_threshold
from dtfcli.training.optim import GROUPS, schedule_factor, set_learning_rates
from dtfcli.training.plan import TrainPlan
from dtfcli.training.run import Run
from dtfcli.training.validation import to_batch


class TrainingDiverged(DTFError):
    """The loss became infinite or NaN."""


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step over `rows_per_step` rows, in micro-batches.

    Returns:
        Metrics of the step: losses averaged over all of it, gradient norm, learning rates and, when the step is
        logged, routing statistics.

    Raises:
        TrainingDiverged: a loss or the gradient is not finite; the weights are still those before the step.
    """
    plan, step, training = run.plan, run.state.step, run.settings.training
    factor = schedule_factor(step, plan.total_steps, plan.warmup_steps, training.schedule)
    rates = set_learning_rates(run.optimizer.param_groups, factor)
    # Several processes decide together whether to stop, not each while it waits for text.
    rows = run.rows.take(step, run.stop.check if run.processes.world_size == 1 else lambda: None)
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    routers: list[Any] = []
    annealed: AbstractContextManager[float | None] = nullcontext()
    if run.objective.blocks:
        routers = list(run.model.model.routers.values())
        _choose_training_routing(run)
        if training.capacity_schedule != "constant":
            left = annealing_left(step, plan.total_steps, training)
            annealed = annealed_capacity(run.model, left, training.capacity_start)
    with annealed as capacity:
        sums = _gradients(run, rows)
    run.states.reduce_gradients()
    run.processes.all_reduce_mean([*sums.values(), *(tensor for router in routers for tensor in router.tracked())])
    metrics = {"train/loss": sums.pop("train/loss").item(), "train/grad_norm": _clip_gradients(run)}
    check_finite(run, metrics)
    run.optimizer.step()
    if run.objective.routed and not run.objective.blocks:
        follow_scores(run)
    if capacity is not None:
        metrics["train/capacity"] = capacity
    return metrics | sums | {f"lr/{name}": rate for name, rate in rates.items()}


def _gradients(run: Run, rows: np.ndarray) -> dict[str, Tensor]:
    """Accumulate this process's gradients of a step's rows [R, T]; returns the sums of losses and statistics."""
    sums: dict[str, Tensor] = {}
    processes, states = run.processes, run.states
    # Gradients and losses are averaged over processes afterwards: each sums up a mean over its part of the targets.
    targets = max(1, count_targets(rows)) / processes.world_size
    shown = is_logged(run.plan, run.state.step + 1)
    parts = run.plan.micro_batches(rows, processes.rank, processes.world_size)
    with states.converting_once():
        for place, part in enumerate(parts, 1):
            input_ids, labels = to_batch(part, processes.device)
            with states.accumulating(is_last=place == len(parts)):
                losses = states.trained(input_ids, targets, output_routing=shown, labels=labels)
                states.backward(losses.loss)
            rest = {f"train/{name}": value for name, value in losses.parts().items()}
            for name, value in {"train/loss": losses.lm_loss, **rest, **(losses.routing or {})}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
    return sums


def _choose_training_routing(run: Run) -> None:
    """Top-K, and for the last `training.threshold_fraction` of the steps the rule of inference."""
    first = first_by_threshold(run.plan.total_steps, run.settings.training)
    if run.state.step == first:
        calibrate(run, capacities=(), tokens=QUICK_CALIBRATION_TOKENS)
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


def check_finite(run: Run, values: dict[str, float]) -> None:
    """Raise `TrainingDiverged` unless all values are finite."""
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


def is_logged(plan: TrainPlan, step: int) -> bool:
    return step % plan.log_every == 0 or step in (1, plan.total_steps)
