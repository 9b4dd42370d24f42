"""The loss on a run's held-out text, as training reports it in `val/loss`, in any routing mode and capacity."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtfcli.data.prepare import prepare_data
from dtfcli.data.targets import count_targets
from dtfcli.errors import DataError, DTFError
from dtfcli.evaluation.report import Metric
from dtfcli.runs.folder import run_settings
from dtfcli.statistics import paired_difference
from dtfcli.training.validation import evaluation_rows, to_batch


@dataclass(frozen=True)
class HeldOut:
    """The validation rows of a run, int32 [N, T], and their UTF-8 bytes per token."""

    rows: Any
    bytes_per_token: float


def held_out_rows(run: Path | None, tokenizer: Any, limit: int | None) -> HeldOut:
    """The validation rows of a run, at most `limit`.

    Raises:
        DataError: the model has no held-out text, or its text is no longer available.
    """
    if run is None:
        raise DataError(
            "validation_text: the model lies in no run folder, whose settings would name its held-out text; give a run "
            "folder, or leave the task out."
        )
    try:
        settings = run_settings(run)
        data = prepare_data(settings.data, tokenizer, seed=settings.run.seed)
    except DTFError as error:
        raise DataError(f"validation_text: {error}") from error
    if not len(data.validation):
        raise DataError(f"validation_text: {run} held out no text (data.validation_fraction is 0); leave it out.")
    rows = evaluation_rows(data.validation, settings.data.validation_blocks)
    # A row inside a long turn of the user has no target.
    rows = rows[[count_targets(row[None]) > 0 for row in rows]]
    return HeldOut(rows[:limit], data.validation_bytes_per_token)


@torch.inference_mode()
def score_rows(model: Any, text: HeldOut, on_answers: Callable[[int], None]) -> tuple[dict[str, Metric], list[float]]:
    """Cross-entropy in nats per token and in bits per byte, with standard errors over rows, and each row's loss.

    Rows go through one at a time, so that each has its own loss and none depends on its neighbors.
    """
    losses, targets = [], []
    for row in text.rows:
        input_ids, labels = to_batch(row[None], model.device)
        losses.append(float(model(input_ids, labels=labels, use_cache=False).loss))
        targets.append(count_targets(row[None]))
        on_answers(1)
    loss = paired_difference([loss * count for loss, count in zip(losses, targets, strict=True)], targets)
    per_byte = 1 / math.log(2) / text.bytes_per_token
    scores = {
        "loss": Metric(loss.value, loss.stderr, False),
        "bits_per_byte": Metric(loss.value * per_byte, loss.stderr and loss.stderr * per_byte, False),
    }
    return scores, losses
