"""The loss on the text that a run held out: what training reports as `val/loss`, in any routing mode and capacity."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtfcli.data.prepare import prepare_data
from dtfcli.data.targets import count_targets
from dtfcli.errors import DataError, DTFError
from dtfcli.evaluation.report import Score
from dtfcli.runs.folder import run_settings
from dtfcli.training.validation import evaluation_rows, to_batch, to_labels


class NotAvailable(DataError):
    """The model has no held-out text, or it cannot be had any more."""


def held_out_rows(run: Path | None, tokenizer: Any) -> tuple[Any, float]:
    """The rows of a run's evaluations, int32 [N, T], and the UTF-8 bytes per token of that text.

    Raises:
        NotAvailable: and why.
    """
    if run is None:
        raise NotAvailable(
            "validation_text: the model lies in no run folder, whose settings would name its held-out text; give a run "
            "folder, or leave the task out."
        )
    try:
        settings = run_settings(run)
        data = prepare_data(settings.data, tokenizer, seed=settings.run.seed)
    except DTFError as error:
        raise NotAvailable(f"validation_text: {error}") from error
    if not len(data.validation):
        raise NotAvailable(f"validation_text: {run} held out no text (data.validation_fraction is 0); leave it out.")
    rows = evaluation_rows(data.validation, settings.data.validation_blocks)
    # A row that lies inside a long turn of the user has no target.
    rows = rows[[count_targets(row[None]) > 0 for row in rows]]
    return rows, data.validation_bytes_per_token


@torch.inference_mode()
def score_rows(
    model: Any, rows: Any, bytes_per_token: float, on_answers: Callable[[int], None]
) -> tuple[dict[str, Score], list[float]]:
    """Cross-entropy in nats per token and bits per byte, with standard errors over rows; and each row's loss.

    Rows go through one at a time: their losses are wanted singly, and none depends on its neighbors then.
    """
    losses, targets = [], []
    for row in rows:
        input_ids, labels = to_batch(row[None], model.device), to_labels(row[None], model.device)
        losses.append(float(model(input_ids, labels=labels, use_cache=False).loss))
        targets.append(count_targets(row[None]))
        on_answers(1)
    mean = statistics.fmean(losses, targets)
    stderr = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    per_byte = 1 / math.log(2) / bytes_per_token
    scores = {
        "loss": Score(mean, stderr, False),
        "bits_per_byte": Score(mean * per_byte, None if stderr is None else stderr * per_byte, False),
    }
    return scores, losses
