"""Measurements of a run on held-out text."""

import math

import numpy as np
import torch
from torch import Tensor

from dtfcli.data.targets import count_targets, target_labels, token_ids
from dtfcli.shares import ShareMeter, measured_shares
from dtfcli.training.distributed import Processes
from dtfcli.training.run import Run


def to_batch(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [B, T], possibly a memory map, as token ids and labels on the device, int64 both.

    Labels are not shifted; -100 is not a target.
    """
    pinned = device.type == "cuda"  # from other memory the host would synchronize with the GPU
    ids, labels = (torch.from_numpy(array) for array in (token_ids(rows), target_labels(rows)))
    ids, labels = (tensor.pin_memory() if pinned else tensor for tensor in (ids, labels))
    return ids.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)


def evaluation_rows(validation: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, evenly spread over the held-out text so that all of its documents have a chance."""
    if len(validation) <= count:
        return validation
    return validation[np.linspace(0, len(validation) - 1, count).astype(np.int64)]


def batches_for(rows: np.ndarray, batch_size: int, processes: Processes) -> tuple[list[np.ndarray], bool]:
    """This process's batches of an evaluation, and whether the processes divide the rows (else each has all).

    All processes get the same number of batches, none of them empty, because each forward is collective.
    """
    count = processes.world_size
    steps = math.ceil(math.ceil(len(rows) / count) / batch_size)
    if count == 1 or steps > len(rows) // count:  # too few rows to go round
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)], False
    return np.array_split(np.array_split(rows, count)[processes.rank], steps), True


@torch.no_grad()
def mean_loss(run: Run) -> float:
    """Cross-entropy per target of the held-out rows in nats, in the model's present routing mode."""
    rows, device, processes = run.validation, run.processes.device, run.processes
    targets = max(1, count_targets(rows))
    total = torch.zeros((), device=device)
    batches, divided = batches_for(rows, run.plan.micro_batch_size, processes)
    for batch in run.stop.between(batches):
        input_ids, labels = to_batch(batch, device)
        total += run.objective(input_ids, targets, labels=labels).lm_loss
    if divided:
        processes.all_reduce_mean([total])
        total *= processes.world_size
    return total.item()


def validate(run: Run) -> dict[str, float]:
    """The metrics of an evaluation on the held-out rows, under the names of metrics.jsonl.

    `val/loss` is in nats per target; a routed model's is in its causal mode, and `val/loss_topk` in the mode that it
    trains in, if that is another. Leaves the objective in eval mode.
    """
    run.objective.eval()
    model, metrics = run.model, dict[str, float]()

    def loss_by(mode: str) -> float:
        with model.routing_mode(mode):
            return mean_loss(run)

    if run.objective.routed:
        with measured_shares(model) as meter:
            loss = loss_by(model.causal_routing)
        whole = ShareMeter()  # rows that every process has seen count once in each
        for counts in run.processes.all_gather(meter.counts()):
            whole.add_counts(counts)
        shares = whole.read()
        if run.objective.blocks:
            metrics["val/loss_topk"] = loss_by("topk")
            metrics["val/loss_gap"] = loss - metrics["val/loss_topk"]
        if model.config.has_predictor:
            metrics["val/loss_predictor"] = loss_by("predictor")
        metrics["val/routed_share"] = shares.overall
        metrics |= {f"val/routed_share/{name}": share for name, share in shares.by_position.items()}
        metrics |= {f"router/{layer}/routed_share": share for layer, share in shares.by_layer.items()}
    else:
        loss = mean_loss(run)
    per_byte = loss / math.log(2) / run.data.validation_bytes_per_token
    return {"val/loss": loss, "val/bits_per_byte": per_byte, **metrics}
