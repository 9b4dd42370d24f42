"""Changes during a run besides the learning rates: its phases, and capacity annealing.

All are pure functions of the step, so that resuming needs no state.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtfcli.settings.training import TrainingSettings


def phase_of(step: int, total_steps: int, training: TrainingSettings) -> str:
    """The phase that step `step` (from 0) belongs to, in words."""
    if annealing_left(step, total_steps, training):
        return "Training, γ on its way"
    if step >= first_by_threshold(total_steps, training):
        return "Training, routing by threshold"
    return "Training"


def first_by_threshold(total_steps: int, training: TrainingSettings) -> int:
    """The first step that routes by threshold, as inference does."""
    return total_steps - round(training.threshold_fraction * total_steps)


def annealing_left(step: int, total_steps: int, training: TrainingSettings) -> float:
    """The share of the way from the first γ to the model's own that is left at step `step` (from 0): 1 to 0.

    A line or half a cosine over the first `capacity_fraction` of the steps, 0 from then on; 0 always for
    "constant".
    """
    length = training.capacity_fraction * total_steps
    if training.capacity_schedule == "constant" or step >= length:
        return 0.0
    progress = step / length
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if training.capacity_schedule == "cosine" else 1.0 - progress


@contextmanager
def annealed_capacity(model: Any, left: float, start: float) -> Iterator[float]:
    """Top-K takes γ = left · start + (1 − left) · the layer's own inside a `with` block; yields the mean over layers.

    The tracked thresholds follow. Outside, and so in every evaluation, calibration and saved model, γ is the model's
    own.
    """
    share = model.config.capacity
    mixed = [left * start + (1.0 - left) * own for own in (share if isinstance(share, (list, tuple)) else [share])]
    capacities = model.config.layer_capacities(mixed if len(mixed) > 1 else mixed[0])
    model.model.training_capacities = capacities
    try:
        yield sum(capacities.values()) / len(capacities)
    finally:
        model.model.training_capacities = None
