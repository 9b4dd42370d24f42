"""What a finished run is worth: its causal loss document by document, and what its model computes for a token."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.data.targets import target_labels, token_ids
from dtfcli.errors import CheckpointError
from dtfcli.evaluation.validation_text import held_out_rows
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import FINAL_MODEL, METRICS_FILE
from dtfcli.shares import measured_shares
from dtfcli.studies.statistics import Losses

_FILE = "measured.json"


@dataclass(frozen=True)
class Measured:
    """A finished run, measured.

    Attributes:
        nats, targets: of each held-out document, in order.
        routed_share: share of tokens that routed layers took on the held-out text; None for a dense model.
        flops: of a forward pass, for each token, at that share.
        curve: (step, causal validation loss) during the run.
        trained_tokens: tokens of training.
    """

    nats: list[float]
    targets: list[int]
    routed_share: float | None
    flops: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    trained_tokens: int = 0

    @property
    def losses(self) -> Losses:
        """By document."""
        return Losses(np.array(self.nats), np.array(self.targets))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.losses.mean


def measure(run: Path, on_progress: Callable[[float], None] | None = None) -> Measured:
    """Measure a finished run, or read what was measured before.

    Args:
        run: run folder with a final model.
        on_progress: called with the share done.

    Raises:
        CheckpointError: the run has no final model, or no validation loss.
        DataError: its held-out text is not available any more.
    """
    kept = run / _FILE
    if kept.is_file():
        values = json.loads(kept.read_text("utf-8"))
        return Measured(**values | {"curve": [tuple(point) for point in values["curve"]]})
    if not (run / FINAL_MODEL).is_dir():
        raise CheckpointError(f"{run}: this run has no {FINAL_MODEL}; go on with it by `dtf train --resume {run}`.")
    lines = read_metrics(run / METRICS_FILE)
    curve = [(int(line["step"]), float(line["val/loss"])) for line in lines if "val/loss" in line]
    if not curve:
        raise CheckpointError(f"{run}: its metrics have no val/loss; train it with data.validation_fraction above 0.")
    model: Any = load_model(run / FINAL_MODEL)
    tokenizer = load_tokenizer(run / FINAL_MODEL)
    rows = held_out_rows(run, tokenizer, None).rows
    nats, targets = [], []
    routed = hasattr(model, "set_routing")
    with measured_shares(model) if routed else nullcontext() as meter:
        for number, row in enumerate(rows):
            for nat, count in _documents(model, row, tokenizer.eos_token_id):
                nats.append(nat)
                targets.append(count)
            if on_progress is not None:
                on_progress((number + 1) / len(rows))
    shares = meter.read() if meter is not None else None
    measured = Measured(
        nats,
        targets,
        routed_share=None if shares is None else shares.overall,
        flops=forward_flops_per_token(model, rows.shape[1], shares=None if shares is None else shares.by_layer),
        curve=curve,
        trained_tokens=max((int(line.get("tokens", 0)) for line in lines), default=0),
    )
    partial = run / f".{_FILE}.partial"
    partial.write_text(json.dumps(asdict(measured)), "utf-8")
    partial.replace(kept)
    return measured


@torch.inference_mode()
def _documents(model: Any, row: Any, end: int | None) -> list[tuple[float, int]]:
    """Nats and number of targets of each document's part in a row: a document ends with its end-of-text token."""
    ids = torch.from_numpy(token_ids(row[None])).to(model.device)
    labels = torch.from_numpy(target_labels(row[None])).to(model.device)[0, 1:]
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(logits, labels, ignore_index=-100, reduction="none").double()
    place = torch.eq(ids[0, :-1], -1 if end is None else end).long().cumsum(0)
    count = int(place[-1]) + 1
    nats = torch.zeros(count, dtype=torch.float64, device=losses.device).index_add(0, place, losses)
    targets = torch.zeros(count, dtype=torch.long, device=losses.device).index_add(0, place, (labels != -100).long())
    return [(float(n), int(t)) for n, t in zip(nats, targets, strict=True) if t]
