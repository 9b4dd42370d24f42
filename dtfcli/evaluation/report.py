"""What an evaluation found, as a document: figures next to everything they depend on."""

import datetime
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, DTFError
from dtfcli.loading.paths import ModelPath, weights_hash
from dtfcli.runs.folder import SETTINGS_FILE
from dtfcli.shares import ShareMeter

LATEST = "latest.json"


@dataclass(frozen=True)
class Score:
    """One metric: its value, standard error (None where there is none) and direction."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScore:
    """The scores of a task or group.

    Attributes:
        metrics: by name; a filter other than lm-eval's "none" is appended, as in `exact_match,strict-match`.
        n: items scored; n_total: items there are.
        shots: few-shot examples in a prompt.
        fewshot_from: the split they came from, "the task" for examples in the task's file; None at 0 shots or where
            tasks of a group differ. "(item excluded)" is appended where it is the split that is scored.
        split: that was scored.
        dataset, data_source: what was scored, and whether it came from the data dir, the Hub or the task itself.
        missing_splits: splits that the task names and its dataset lacks.
        routing, causal: how tokens were routed; dense models are causal.
        routed_share: of each layer, by position and over all; None for a dense model, and for the members of a group,
            which are scored together.
        truncated: requests that were longer than the model's positions and lost their beginning; None for members.
        seconds: of computing the answers, those of earlier attempts included; None for members.
        version: of the task.
        subtasks: members of a group.
        notes: what else one should know.
    """

    metrics: dict[str, Score]
    n: int
    n_total: int | None
    shots: int | None
    fewshot_from: str | None
    split: str | None
    dataset: str | None
    data_source: str | None
    missing_splits: tuple[str, ...]
    routing: str
    causal: bool
    routed_share: dict[str, Any] | None
    truncated: int | None
    seconds: float | None
    version: Any
    subtasks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Items:
    """What is needed to compare two models item by item; not part of the document.

    Attributes:
        hashes: of the items, in order.
        values: of each metric, in the same order.
        aggregate: of each metric, from items to score.
    """

    hashes: tuple[str, ...]
    values: dict[str, list[Any]]
    aggregate: dict[str, Callable[[list[Any]], float]]


@dataclass(frozen=True)
class EvalReport:
    """All scores of one model.

    Attributes:
        model: as the user named it.
        model_hash: sha256 over its weights.
        architecture: dtf, mod or dense; routing: mode, "dense" for a dense model.
        causal: whether no token's path depended on later ones.
        capacity: γ that was asked for, or the model's own; None for a dense model.
        routed_share: realized, over all tasks.
        tasks: the names that were asked for, in order.
        results: by task and group.
        skipped: what could not be run, with the reason.
        limit, num_fewshot: as asked for; None: each task's own.
        seed: of few-shot sampling and everything else that is drawn.
        batch_size: rows; "auto" where they were fitted to memory.
        started: UTC; seconds: of this run of the command.
        reused: requests answered by an earlier run that was stopped.
    """

    model: str
    model_hash: str
    architecture: str
    routing: str
    causal: bool
    capacity: float | list[float] | None
    routed_share: dict[str, Any] | None
    tasks: tuple[str, ...]
    results: dict[str, TaskScore]
    skipped: dict[str, str]
    limit: int | None
    num_fewshot: int | None
    seed: int
    batch_size: int | str
    device: str
    dtype: str
    versions: dict[str, str]
    started: str
    seconds: float
    reused: int
    items: dict[str, Items] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The document: plain values, None for what is not finite."""
        return plain({name: value for name, value in self.__dict__.items() if name != "items"})


def plain(value: Any) -> Any:
    """A value that JSON takes: dataclasses and mappings as objects, sequences as lists, NaN and infinity null."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def shares_of(meter: ShareMeter | None) -> dict[str, Any] | None:
    """What a meter has read, with names; None where nothing was routed."""
    if meter is None or not meter.counts():
        return None
    shares = meter.read()
    return {
        "overall": shares.overall,
        "by_layer": {str(layer): share for layer, share in shares.by_layer.items()},
        "by_position": shares.by_position,
        "tokens": shares.tokens,
    }


def model_hash(model: Any, source: ModelPath | None) -> str:
    """sha256 over a model's weights: of its files where they are here, else of its tensors.

    Args:
        model: the loaded model.
        source: where it came from; None for a model that was made in memory.
    """
    if source is not None and source.kind != "hub":
        return f"sha256:{weights_hash(Path(source.path))}"
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a model lies in or is."""
    for folder in (path, path.parent):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    return None


def results_folder(model: str, source: ModelPath) -> Path:
    """Where results go.

    `eval/` of the run folder for a run's final model, else in the model folder or beside the .gguf file; for a model
    on the Hub in the working folder.
    """
    path = Path(source.path)
    if source.kind == "hub":
        return Path("eval") / source.path.replace("/", "--")
    if source.kind == "gguf":
        return path.parent / "eval"
    run = run_folder_of(path)
    if run is not None and (path == run or path.name == "final_model" or Path(model).expanduser() == run):
        return run / "eval"
    return path / "eval"


def check_writable(folder: Path) -> None:
    """Refuse a folder that results cannot be written to, before hours are spent.

    Raises:
        ConfigError: it cannot be made or written.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{folder}: results cannot be written there ({existing} is not writable); give --output FILE."
        )


def save(document: dict[str, Any], folder: Path) -> Path:
    """Write a document as `<time>.json` and as `latest.json`; returns the first.

    Raises:
        DTFError: the folder cannot be written.
    """
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    path, count = folder / f"{stamp}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stamp}-{count}.json"
    write_document(document, path)
    write_document(document, folder / LATEST)
    return path


def write_document(document: Any, path: Path) -> None:
    """Write JSON in one step: a reader finds the old document or the new one.

    Raises:
        DTFError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DTFError(
            f"{path}: cannot be written ({error.strerror}); name another place with --output FILE."
        ) from error
