"""Thresholds in the course of a run: measured on training text, for an evaluation, and for the saved models."""

from collections.abc import Iterator
from contextlib import contextmanager

from dtfcli.loading.adapters import adapter_state, is_adapted, load_adapter_state, read_adapter
from dtfcli.runs.folder import BEST_MODEL
from dtfcli.training.checkpoint import save_model
from dtfcli.training.run import Run
from dtfcli.training.validation import calibration_batches

QUICK_CALIBRATION_TOKENS = 4096
"""Of training text, for thresholds at the model's own capacity alone."""


def calibrate(run: Run, capacities: tuple[float, ...] | None = None, tokens: int | None = None) -> None:
    """Measure thresholds on training text.

    Args:
        run: with a routed model.
        capacities: (): at the model's own capacity alone; None: on the whole grid.
        tokens: of text, at most; None: `training.calibration_tokens`.
    """
    run.report("phase", "Calibrating thresholds")
    most = run.settings.training.calibration_tokens
    batches = calibration_batches(
        run.data.train, min(most, tokens or most), run.plan.micro_batch_size, run.settings.run.seed
    )
    # In the precision that the losses are measured in: thresholds are quantiles of its scores.
    with run.accelerator.autocast(), run.states.outside():
        run.model.calibrate(batches, capacities=capacities)
    run.processes.broadcast([table for name, table in run.model.named_buffers() if "thresholds" in name])


@contextmanager
def evaluation_thresholds(run: Run) -> Iterator[None]:
    """Calibrated thresholds for an evaluation during the run; afterwards the tracked ones again.

    The averages that training tracks lag behind while the scores still move: they routed anything from nothing to
    everything. At the end `finish` has calibrated already.
    """
    if not (run.objective.routed and len(run.validation) and run.state.step < run.plan.total_steps):
        yield
        return
    routers = run.model.model.routers
    tracked = {layer: router.threshold.clone() for layer, router in routers.items() if router.by_token}
    try:
        calibrate(run, capacities=(), tokens=QUICK_CALIBRATION_TOKENS)
        yield
    finally:
        if run.state.step:  # before the first step nothing was tracked
            for layer, threshold in tracked.items():
                routers[layer].threshold.copy_(threshold)


def complete_best_model(run: Run) -> None:
    """Calibrate a best model from the way, saved with thresholds of its own capacity alone, for any capacity."""
    best, adapted = run.folder / BEST_MODEL, is_adapted(run.model)
    state = run.states.whole(adapter_state(run.model)) if adapted else run.model.state_dict()
    final = {name: tensor.clone() for name, tensor in state.items()}
    if adapted:
        load_adapter_state(run.model, read_adapter(best))
    else:
        run.states.load_weights(best)
    calibrate(run)
    save_model(run, BEST_MODEL)
    if adapted:
        load_adapter_state(run.model, final)
    else:
        run.model.load_state_dict(final)
