"""What a run measures on held-out text, and the calibration of thresholds on training text."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtfcli.data.targets import count_targets, target_labels, token_ids
from dtfcli.shares import ShareMeter, measured_shares
from dtfcli.training.distributed import Processes

Between = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]

ALONE = Processes()


def to_batch(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows [B, T], possibly a memory map, → their token ids, an int64 tensor on the device."""
    return _moved(torch.from_numpy(token_ids(rows)), device)


def to_labels(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows [B, T] → labels, not shifted, an int64 tensor on the device; -100 is not a target."""
    return _moved(torch.from_numpy(target_labels(rows)), device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. To a GPU from pinned memory; otherwise the host would synchronize with it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def evaluation_rows(validation: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, evenly spread over the held-out text so that all of its documents have a chance."""
    if len(validation) <= count:
        return validation
    return validation[np.linspace(0, len(validation) - 1, count).astype(np.int64)]


def batches_for(rows: np.ndarray, batch_size: int, processes: Processes) -> tuple[list[np.ndarray], bool]:
    """This process's batches of an evaluation, and whether the processes have parts of the rows (else each has all).

    All processes get the same number of batches, none of them empty, because each forward is a meeting of all.
    """
    count = processes.world_size
    steps = math.ceil(math.ceil(len(rows) / count) / batch_size)
    if count == 1 or steps > len(rows) // count:  # too few rows to go round
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)], False
    return np.array_split(np.array_split(rows, count)[processes.rank], steps), True


@torch.no_grad()
def mean_loss(
    objective: Any, rows: np.ndarray, batch_size: int, device: torch.device, between: Between, processes: Processes
) -> float:
    """Cross-entropy per target in nats, in the model's present routing mode."""
    targets = max(1, count_targets(rows))
    total = torch.zeros((), device=device)
    batches, shared = batches_for(rows, batch_size, processes)
    for batch in between(batches):
        total += objective(to_batch(batch, device), targets, labels=to_labels(batch, device)).lm_loss
    if shared:
        processes.all_reduce_mean(total)
        total *= processes.world_size
    return total.item()


def validate(
    objective: Any,
    rows: np.ndarray,
    *,
    batch_size: int,
    bytes_per_token: float,
    device: torch.device,
    between: Between,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """The losses of an evaluation under the names of metrics.jsonl.

    A routed model is measured causally (`val/loss`, with the realized share over all, by layer and by position) and by
    its training rule (`val/loss_topk`; `val/loss_gap` is what causality costs), one with predictors by these too
    (`val/loss_predictor`); a dense one has `val/loss` alone.

    Args:
        objective: the prepared `Objective`; left in eval mode.
        rows: int32 [N, T] of held-out tokens.
        batch_size: rows of a forward.
        bytes_per_token: of the validation text, for bits per byte.
        device: of the model.
        between: wraps the batches, to stop between two of them.
        processes: that share the rows; all of them get the same result.
    """
    objective.eval()
    model = objective.model

    def loss_by(mode: str) -> float:
        with model.routing_mode(mode):
            return mean_loss(objective, rows, batch_size, device, between, processes)

    metrics: dict[str, float] = {}
    if objective.routed:
        with measured_shares(model) as meter:
            loss = loss_by(model.causal_routing)
        shares = _of_all(meter, processes).read()
        metrics["val/loss_topk"] = loss_by("topk")
        metrics["val/loss_gap"] = loss - metrics["val/loss_topk"]
        if model.config.has_predictor:
            metrics["val/loss_predictor"] = loss_by("predictor")
        metrics["val/routed_share"] = shares.overall
        metrics |= {f"val/routed_share/{name}": share for name, share in shares.by_position.items()}
        metrics |= {f"router/{layer}/routed_share": share for layer, share in shares.by_layer.items()}
    else:
        loss = mean_loss(objective, rows, batch_size, device, between, processes)
    return {"val/loss": loss, "val/bits_per_byte": loss / math.log(2) / bytes_per_token, **metrics}


def _of_all(meter: ShareMeter, processes: Processes) -> ShareMeter:
    """The counts of all processes' meters together; rows that every process saw count once in each."""
    if processes.world_size == 1:
        return meter
    total = ShareMeter()
    for counts in processes.all_gather(meter.counts()):
        total.add_counts(counts)
    return total


def calibration_rows(total_rows: int, seq_len: int, tokens: int, seed: int) -> list[tuple[int, int]]:
    """Rows for calibrating thresholds, as (row, length).

    Every other row is cut to a random length: shares depend on the position in a row (the moving average of surprise
    starts empty), so short texts must be among those that the thresholds are measured on.

    Args:
        total_rows: rows of training text.
        seq_len: their length.
        tokens: how many real tokens, reached or exceeded by less than a row; each row is used at most once.
        seed: of the run.
    """
    rng = np.random.RandomState(seed)  # its stream is frozen across versions of NumPy
    chosen: list[tuple[int, int]] = []
    total = 0
    for place, row in enumerate(rng.permutation(total_rows)):
        if total >= tokens:
            break
        length = seq_len if place % 2 == 0 else int(rng.randint(min(16, seq_len), seq_len + 1))
        chosen.append((int(row), length))
        total += length
    return chosen


def calibration_batches(train: np.ndarray, tokens: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Training text of mixed lengths for `model.calibrate`, right-padded, rows of similar length together."""
    rows = sorted(calibration_rows(train.shape[0], train.shape[1], tokens, seed), key=lambda row: -row[1])
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = part[0][1]
        input_ids = torch.from_numpy(token_ids(np.stack([train[row, :longest] for row, _ in part])))
        lengths = torch.tensor([length for _, length in part])
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        batches.append({"input_ids": input_ids, "attention_mask": mask})
    return batches
