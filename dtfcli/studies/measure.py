"""Measures finished runs: causal loss and accuracy document by document, who was routed, what a token costs."""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.data.targets import target_labels, token_ids
from dtfcli.errors import CheckpointError, ConfigError
from dtfcli.evaluation.validation_text import held_out_rows
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.models.conversion import to_dense
from dtfcli.models.observed import observed_passes
from dtfcli.models.pretrained import is_routed
from dtfcli.runs.files import read_metrics, replaced_file
from dtfcli.runs.folder import FINAL_MODEL, METRICS_FILE, run_settings
from dtfcli.settings import Settings
from dtfcli.statistics import TextLosses
from dtfcli.studies.grid import Point, check_equal_terms, resolved

_FILE = "measured.npz"
_VARY = ("model.architecture", "model.capacity")
"""The settings in which runs that exist may differ."""
_VERSION = 2
"""Of the file; raise it whenever the meaning or the fields of `Measured` change."""

Curve = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True)
class Measured:
    """A finished run, measured.

    Attributes:
        nats, targets, correct: of each held-out document, in order; targets that were the likeliest token are correct.
        routed_share: share of tokens that routed layers took on the held-out text; None for a dense model.
        flops, dense_flops: of a forward pass, for each token, at that share; and of its own dense backbone.
        curve: causal validation loss during the run.
        share_curve: causal routed share on held-out text during the run; empty for a dense model.
        routed: by layer, bool [held-out tokens], who entered.
    """

    nats: list[float]
    targets: list[int]
    correct: list[int]
    routed_share: float | None
    flops: float
    dense_flops: float
    curve: Curve
    share_curve: Curve
    routed: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def losses(self) -> TextLosses:
        """By document."""
        return TextLosses(np.array(self.nats), np.array(self.targets))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.losses.mean

    @property
    def accuracy(self) -> float:
        """Share of the targets that were the likeliest token."""
        return sum(self.correct) / sum(self.targets)


@dataclass(frozen=True)
class Finished:
    """A finished run of a study: its point, seed and folder, and its measurements."""

    point: Point
    seed: int
    folder: Path
    measured: Measured


def finished_runs(folders: Sequence[Path]) -> list[Finished]:
    """Measure runs that exist.

    Raises:
        ConfigError: one is named twice, or they differ in more than architecture, capacity and seed.
        CheckpointError: a folder is not a run, or has no final model or validation loss.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("--from: a run is named twice; name each once.")
    settings = [run_settings(folder) for folder in folders]
    check_equal_terms(settings, _VARY)
    runs: dict[tuple[str, int], tuple[Point, Path]] = {}
    for run, folder in zip(settings, folders, strict=True):
        point = point_of(run)
        _, other = runs.setdefault((point.name, run.run.seed), (point, folder))
        if other is not folder:
            raise ConfigError(f"--from: {other} and {folder} are both {point.name} with seed {run.run.seed}; name one.")
    return [Finished(point, seed, folder, measure(folder)) for (_, seed), (point, folder) in runs.items()]


def point_of(settings: Settings) -> Point:
    """The point of a run: its architecture, and its capacity unless it is dense."""
    values: list[str] = [settings.model.architecture]
    if values != ["dense"]:
        capacity = resolved(settings)["model"]["capacity"]
        shares = capacity if isinstance(capacity, list) else [capacity]
        values.append(",".join(f"{share:g}" for share in shares))
    return Point(" ".join(values), dict(zip(_VARY, values, strict=False)), ())


def measure(run: Path) -> Measured:
    """Measure a finished run, or read its earlier measurement.

    Args:
        run: run folder with a final model.

    Raises:
        CheckpointError: the run has no final model, or no validation loss.
        DataError: its held-out text is not available any more.
    """
    if (before := _read(run)) is not None:
        return before
    if not (run / FINAL_MODEL).is_dir():
        raise CheckpointError(f"{run}: this run has no {FINAL_MODEL}; go on with it by `dtf train --resume {run}`.")
    lines = read_metrics(run / METRICS_FILE)
    curve = _curve(lines, "val/loss")
    if not curve:
        raise CheckpointError(f"{run}: its metrics have no val/loss; train it with data.validation_fraction above 0.")
    model: Any = load_model(run / FINAL_MODEL)
    tokenizer = load_tokenizer(run / FINAL_MODEL)
    rows = held_out_rows(run, tokenizer, None).rows
    documents: list[tuple[float, int, int]] = []
    with _watched(model) as seen:
        for row in rows:
            documents += _documents(model, row, tokenizer.eos_token_id)
    routed = {layer: np.concatenate(parts) for layer, parts in seen.items()}
    shares = {layer: float(selected.mean()) for layer, selected in routed.items()}
    nats, targets, correct = (list(column) for column in zip(*documents, strict=True))
    if not np.isfinite(nats).all():
        raise CheckpointError(f"{run}: its validation loss is no number any more; train it with lower learning rates.")
    measured = Measured(
        nats,
        targets,
        correct,
        routed_share=statistics.fmean(shares.values()) if shares else None,
        flops=forward_flops_per_token(model, rows.shape[1], shares=shares or None),
        dense_flops=forward_flops_per_token(to_dense(model) if shares else model, rows.shape[1]),
        curve=curve,
        share_curve=_curve(lines, "val/routed_share"),
        routed=routed,
    )
    _write(run, measured)
    return measured


def _write(run: Path, measured: Measured) -> None:
    """Keep a measurement: everything as JSON, and who was routed as bits."""
    layers, selected = list(measured.routed), np.array(list(measured.routed.values()), dtype=bool)
    document = json.dumps({"version": _VERSION, **asdict(replace(measured, routed={}))})
    bits = {"layers": layers, "count": selected.shape[-1], "packed": np.packbits(selected, axis=-1)}
    with replaced_file(run / _FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, document=document, **bits)


def _read(run: Path) -> Measured | None:
    """An earlier measurement; None: there is none, or it is of another version of this file."""
    if not (run / _FILE).is_file():
        return None
    with np.load(run / _FILE) as file:
        values = json.loads(str(file["document"]))
        if values.pop("version") != _VERSION:
            return None
        selected = np.unpackbits(file["packed"], axis=-1, count=int(file["count"])).astype(bool)
        values["routed"] = dict(zip(file["layers"].tolist(), selected, strict=True))
    for name in ("curve", "share_curve"):
        values[name] = [tuple(point) for point in values[name]]
    return Measured(**values)


def _curve(lines: list[dict[str, Any]], name: str) -> Curve:
    return [(int(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]


@contextmanager
def _watched(model: Any) -> Iterator[dict[int, list[NDArray[np.bool_]]]]:
    """Collect who enters each routed layer in the forward passes of a `with` block; nothing for a dense model."""
    seen: dict[int, list[NDArray[np.bool_]]] = {}

    def collect(output: Any) -> None:
        for record in output.routing:
            seen.setdefault(record.layer, []).append(record.selected.flatten().cpu().numpy())

    with observed_passes(model, collect) if is_routed(model) else nullcontext():
        yield seen


@torch.inference_mode()
def _documents(model: Any, row: Any, end: int | None) -> list[tuple[float, int, int]]:
    """Nats, targets and correct ones of each document's part in a row: a document ends with its end-of-text token."""
    ids = torch.from_numpy(token_ids(row[None])).to(model.device)
    labels = torch.from_numpy(target_labels(row[None])).to(model.device)[0, 1:]
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(logits, labels, ignore_index=-100, reduction="none").double()
    place = torch.eq(ids[0, :-1], -1 if end is None else end).long().cumsum(0)
    each = torch.stack([losses, (labels != -100).double(), (logits.argmax(-1) == labels).double()], dim=1)
    sums = torch.zeros(int(place[-1]) + 1, 3, dtype=torch.float64, device=each.device).index_add(0, place, each)
    return [(nats, int(targets), int(correct)) for nats, targets, correct in sums.tolist() if targets]
