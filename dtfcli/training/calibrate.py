"""Measurements on training text: fits before the first step, and thresholds for evaluations and saved models.

Routed MLPs route by threshold in training, too. Their scores and thresholds choose, so no gradient reaches them: both
are fitted again before each evaluation and at the end. In the steps in between thresholds follow the scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtfcli.data.documents import OnProgress
from dtfcli.data.targets import token_ids
from dtfcli.loading.adapters import adapter_state, is_adapted, load_adapter_state, read_adapter
from dtfcli.loading.devices import compute_dtype
from dtfcli.models import mlp_fitting
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM, interpolated, quantile, routed_mlps
from dtfcli.runs.folder import BEST_MODEL
from dtfcli.settings import Settings
from dtfcli.training.checkpoint import save_model
from dtfcli.training.run import Run

_FIT_TOKENS_PER_UNIT = 32
"""Of training text, for each unit of the hidden size."""
QUICK_CALIBRATION_TOKENS = 4096
"""Of training text, for thresholds at the model's own capacity alone."""


def calibration_batches(train: np.ndarray, tokens: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Training text of mixed lengths for `model.calibrate`, right-padded, rows of similar length together.

    Every other row is cut to a random length: shares depend on the position in a row (the moving average of surprise
    starts empty), so thresholds have to be measured on short texts, too.

    Args:
        train: training text, int32 [N, T].
        tokens: how many real tokens, reached or exceeded by less than a row; each row is used at most once.
        batch_size: rows of a batch.
        seed: of the run.
    """
    rng = np.random.RandomState(seed)  # its stream is frozen across versions of NumPy
    rows, seq_len, total = list[tuple[int, int]](), train.shape[1], 0
    for place, row in enumerate(rng.permutation(len(train))):
        if total >= tokens:
            break
        rows.append((int(row), seq_len if place % 2 == 0 else int(rng.randint(min(16, seq_len), seq_len + 1))))
        total += rows[-1][1]
    rows.sort(key=lambda row: -row[1])
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = part[0][1]
        input_ids = torch.from_numpy(token_ids(np.stack([train[row, :longest] for row, _ in part])))
        lengths = torch.tensor([length for _, length in part])
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        batches.append({"input_ids": input_ids, "attention_mask": mask})
    return batches


def whole_rows(train: np.ndarray, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Training text for routed MLPs, which know no positions: as many whole rows, in one batch, as have the tokens."""
    chosen = np.random.RandomState(seed).permutation(len(train))[: -(-tokens // train.shape[1])]
    return [{"input_ids": torch.from_numpy(token_ids(train[chosen]))}]


def fit_routing(settings: Settings, model: Any, rows: Any, device: torch.device, on_progress: OnProgress) -> None:
    """Fit forecasts and predicted costs of a converted model by least squares, before the first step.

    A model that was routed before is fitted only if `training.fit_tokens` is set. rows: training text, int32 [N, T].
    """

    def on_layer(layer: int, layers: int) -> None:
        on_progress("Fitting forecasts and predicted costs", layer / layers)

    mlps, tokens, seed = isinstance(model, RoutedCausalLM), settings.training.fit_tokens, settings.run.seed
    if tokens is None:
        tokens = 0 if model.is_fitted else _FIT_TOKENS_PER_UNIT * model.config.hidden_size
    if not (tokens and (mlps or (settings.model.base and model.config.learns_from_updates))):
        return
    dtype = compute_dtype(settings.run.dtype, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.random.fork_rng():
        torch.manual_seed(seed)  # low ranks are found with random numbers
        if mlps:
            mlp_fitting.fit_routing(model, whole_rows(rows, tokens, seed), on_layer)
        else:
            batches = calibration_batches(rows, tokens, settings.training.micro_batch_size, seed)
            model.fit_routing(batches, on_layer, device)


def fit_scores(run: Run) -> None:
    """Fit scores and thresholds of routed MLPs again; forecasts stay as they have learned."""
    phase = "Fitting scores and thresholds"
    run.report("phase", phase)
    batches = whole_rows(run.data.train, run.settings.training.calibration_tokens, run.settings.run.seed)
    with run.accelerator.autocast(), run.states.outside():
        mlp_fitting.fit_routing(
            run.model, batches, lambda done, mlps: run.report("phase", phase, done / mlps), forecasts=False
        )
    routers = [mlp.router for mlp in routed_mlps(run.model).values()]
    run.processes.broadcast([tensor.data for router in routers for tensor in router.state_dict().values()])
    for router in routers:
        router.current = None


def follow_scores(run: Run) -> None:
    """Shift the thresholds of routed MLPs to where they would have had the right share of this step's tokens enter."""
    mlps, scores = routed_mlps(run.model), run.objective.scores
    shares = {layer: interpolated(mlp.router.shares, mlp.capacity).item() for layer, mlp in mlps.items()}
    now = {layer: mlp.router.threshold(mlp.capacity) for layer, mlp in mlps.items()}
    shifts = torch.stack([quantile(torch.cat(scores.pop(layer)), shares[layer]) - now[layer] for layer in mlps])
    run.processes.all_reduce_mean([shifts])
    for mlp, shift in zip(mlps.values(), shifts, strict=True):
        mlp.router.keep(mlp.router.thresholds.sum(0) + shift)


def calibrate(run: Run, capacities: tuple[float, ...] | None = None, tokens: int | None = None) -> None:
    """Measure the thresholds of a routed model on training text.

    Args:
        run: with a routed model; its MLPs are calibrated on the whole grid, whatever is asked for.
        capacities: (): at the model's own capacity alone; None: on the whole grid.
        tokens: of text, at most; None: `training.calibration_tokens`.
    """
    if not run.objective.blocks:
        fit_scores(run)
        return
    phase = "Calibrating thresholds"
    run.report("phase", phase)
    most = run.settings.training.calibration_tokens
    batches = calibration_batches(
        run.data.train, min(most, tokens or most), run.plan.micro_batch_size, run.settings.run.seed
    )
    # In the precision that the losses are measured in: thresholds are quantiles of its scores.
    with run.accelerator.autocast(), run.states.outside():
        run.model.calibrate(batches, capacities, lambda done, passes: run.report("phase", phase, done / passes))
    run.processes.broadcast([table for name, table in run.model.named_buffers() if "thresholds" in name])


@contextmanager
def evaluation_thresholds(run: Run) -> Iterator[None]:
    """Calibrated thresholds for an evaluation during the run; afterwards the tracked ones again.

    Tracked averages lag while the scores move: they would route anything from nothing to everything. At the end of a
    run the thresholds are calibrated already. Routed MLPs track nothing, and keep what is measured here.
    """
    between = run.objective.routed and run.state.step < run.plan.total_steps
    if not (between and run.objective.blocks):
        if between and run.state.step:
            fit_scores(run)
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
    """Calibrate a best model of an earlier step for any capacity; it was saved with thresholds of its own alone."""
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
