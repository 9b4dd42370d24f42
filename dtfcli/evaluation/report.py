"""What an evaluation found, as a document: figures next to everything they depend on.

`EvalReport.read` reads such a document back, and lm-eval's own result files as far as they go.
"""

import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dtfcli.errors import ConfigError, DTFError, reason_of
from dtfcli.loading.model_files import weights_hash
from dtfcli.loading.quantization import plain_tensors
from dtfcli.loading.source import ModelSource
from dtfcli.models.configuration_fields import CAUSAL_MODES, ROUTING_MODES
from dtfcli.runs.files import replaced_file
from dtfcli.runs.folder import EVALUATIONS, FINAL_MODEL, SETTINGS_FILE
from dtfcli.shares import ShareMeter

LATEST = "latest.json"


def is_causal(routing: str) -> bool:
    """Whether no token's path depends on later tokens; a dense model's never does."""
    return routing in CAUSAL_MODES or routing not in ROUTING_MODES


@dataclass(frozen=True)
class Metric:
    """A figure, its standard error and its direction; None where lm-eval has none."""

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The scores of a task or group.

    Attributes:
        metrics: by name. A filter other than lm-eval's "none" is appended, as in `exact_match,strict-match`.
        n: items scored; n_total: items in the split.
        shots: few-shot examples in a prompt.
        fewshot_from: the split of these examples, or "the task" for examples in the task's file; None at 0 shots, or
            where tasks of a group differ. "(item excluded)" follows a split that is also the scored one.
        split: the scored one.
        dataset: Hub id and configuration, as `owner/name (configuration)`.
        data_source: "data-dir", "hub", "task" or "run".
        missing_splits: splits that the task names and its dataset lacks.
        routing, causal: how tokens were routed; dense models are causal.
        routed_share: of each layer, by position and overall; None for a dense model, and for members of a group,
            which are scored together.
        truncated: requests that exceeded the model's positions and lost their beginning; None for members.
        seconds: spent on the answers, earlier attempts included; None for members.
        version: of the task.
        subtasks: members of a group.
        notes: further remarks.
    """

    metrics: dict[str, Metric]
    n: int = 0
    n_total: int | None = None
    shots: int | None = None
    fewshot_from: str | None = None
    split: str | None = None
    dataset: str | None = None
    data_source: str | None = None
    missing_splits: tuple[str, ...] = ()
    routing: str = ""
    causal: bool = True
    routed_share: dict[str, Any] | None = None
    truncated: int | None = None
    seconds: float | None = None
    version: Any = None
    subtasks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Items:
    """What a comparison of two models item by item needs; not part of the document.

    Attributes:
        hashes: one for each item, in order.
        values: of each metric, in the same order.
        aggregate: for each metric, the function from items to score.
    """

    hashes: tuple[str, ...]
    values: dict[str, list[Any]]
    aggregate: dict[str, Callable[[list[Any]], float]]


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """All scores of one model; lm-eval's own files leave much of it out.

    Attributes:
        model: as the user named it.
        model_hash: sha256 over its weights.
        architecture: dtf, mod or dense.
        routing: mode; "dense" for a dense model.
        causal: whether no token's path depended on later ones.
        capacity: γ of the evaluation; None for a dense model.
        routed_share: measured over all tasks.
        tasks: names as asked for, in order.
        results: by task and group.
        skipped: tasks that could not be run, with the reason.
        limit, num_fewshot: as asked for; None: each task's own.
        seed: of few-shot sampling and of everything else that is drawn.
        batch_size: rows; "auto" where they were fitted to memory.
        started: UTC.
        seconds: of this run of the command.
        reused: requests answered by an earlier run that was stopped.
        quantize: int8 or int4, where the model's weights were quantized for the evaluation; None: they were plain.
        quantization: what that changed (`loading.quantization.Quantization`).
    """

    model: str = ""
    model_hash: str | None = None
    architecture: str = ""
    routing: str = ""
    causal: bool = True
    capacity: float | list[float] | None = None
    routed_share: dict[str, Any] | None = None
    tasks: tuple[str, ...] = ()
    results: dict[str, TaskScore]
    skipped: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    seed: int | None = None
    batch_size: int | str = "auto"
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    reused: int = 0
    quantize: str | None = None
    quantization: dict[str, Any] | None = None
    items: dict[str, Items] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The document: plain values, None for what is not finite."""
        return plain({name: value for name, value in self.__dict__.items() if name != "items"})

    @classmethod
    def read(cls, path: Path, label: str) -> "EvalReport":
        """Read a document that `dtf eval` or lm-eval wrote; figures that are not finite are left out.

        Args:
            path: of the JSON file.
            label: names the file in messages, such as "--eval-results FILE".

        Raises:
            ConfigError: the file is missing, not JSON, or without results.
        """
        document = _read_json(path, label)
        results = document["results"]
        if not any(isinstance(entry, dict) and "metrics" in entry for entry in results.values()):
            document = _from_lm_eval(document)
        known = {Path(name).name: _finite(entry) for name, entry in document["results"].items()}
        document["results"] = {name: entry for name, entry in known.items() if entry}
        if not document["results"]:
            raise ConfigError(f'{label}: its "results" hold no figure; run `dtf eval` again.')
        document.pop("items", None)
        document = {name: _without_none(value) for name, value in document.items() if value is not None}
        if not isinstance(document.get("routed_share"), dict):
            document.pop("routed_share", None)
        try:
            report = TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{label}: {place}: {first['msg']}; run `dtf eval` again.") from error
        return replace(report, causal=report.causal and is_causal(report.routing))


def _without_none(value: Any) -> Any:
    """A table without its empty entries, which then take their defaults."""
    if not isinstance(value, dict):
        return value
    return {name: _without_none(item) for name, item in value.items() if item is not None}


def _read_json(path: Path, label: str) -> dict[str, Any]:
    remedy = "give the JSON that `dtf eval` wrote"
    try:
        document = json.loads(path.read_text("utf-8"), parse_constant=lambda name: None)
    except FileNotFoundError:
        raise ConfigError(f"{label}: there is no such file; `dtf eval MODEL` writes one (eval/latest.json).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label}: cannot be read ({error}); {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: not valid JSON ({reason_of(error)}); {remedy}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
        raise ConfigError(f'{label}: has no "results"; {remedy}.')
    return document


def _finite(entry: Any) -> dict[str, Any] | None:
    """A task's entry with the metrics that have a value; None where none has, as for a group that only holds others."""
    metrics = entry.get("metrics") if isinstance(entry, dict) else None
    metrics = metrics if isinstance(metrics, dict) else {}
    finite = {name: m for name, m in metrics.items() if isinstance(m, dict) and _number(m.get("value")) is not None}
    return {**entry, "metrics": finite} if finite else None


def _from_lm_eval(document: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's own document in the form of ours, as far as it goes."""

    def table(key: str, name: str) -> dict[str, Any]:
        entry = document.get(key)
        entry = entry.get(name) if isinstance(entry, dict) else None
        return entry if isinstance(entry, dict) else {}

    results: dict[str, Any] = {}
    shots = document.get("n-shot")
    for name, entry in document["results"].items():
        figures = {key: value for key, value in entry.items() if "," in key} if isinstance(entry, dict) else {}
        metrics = {
            key.removesuffix(",none"): {"value": value, "stderr": _number(figures.get(key.replace(",", "_stderr,", 1)))}
            for key, value in figures.items()
            if "_stderr," not in key and _number(value) is not None
        }
        counts, config = table("n-samples", name), table("configs", name)
        path, part = config.get("dataset_path"), config.get("dataset_name")
        results[name] = {
            "metrics": metrics,
            "n": counts.get("effective") or 0,
            "n_total": counts.get("original"),
            "shots": shots.get(name) if isinstance(shots, dict) else None,
            "dataset": f"{path} ({part})" if path and part else path,
        }
    versions = {"lm_eval": document.get("lm_eval_version"), "transformers": document.get("transformers_version")}
    routing = _model_argument(document, "routing")
    return {
        "results": results,
        "routing": routing or "",
        "causal": is_causal(routing or ""),
        "versions": {name: version for name, version in versions.items() if version},
    }


def _model_argument(document: dict[str, Any], name: str) -> str | None:
    """A value from lm-eval's record of `--model_args`."""
    config = document.get("config")
    arguments = config.get("model_args") if isinstance(config, dict) else None
    if isinstance(arguments, dict):
        value = arguments.get(name)
        return value if isinstance(value, str) else None
    match = re.search(rf"(?:^|,){name}=([^,]+)", arguments) if isinstance(arguments, str) else None
    return match.group(1) if match else None


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


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
    """What a meter has read, as plain values; None where nothing was routed."""
    if meter is None or not meter.counts():
        return None
    shares = meter.read()
    return {
        "overall": shares.overall,
        "by_layer": {str(layer): share for layer, share in shares.by_layer.items()},
        "by_position": shares.by_position,
        "tokens": shares.tokens,
    }


def model_hash(model: Any, source: ModelSource | None) -> str:
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
        for part in plain_tensors(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a model lies in or is."""
    for folder in (path, path.parent):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    return None


def results_folder(model: str, source: ModelSource) -> Path:
    """Where results go.

    `eval/` of the run folder for a run's final model, else in the model folder or beside the .gguf file; for a model
    on the Hub in the working folder.
    """
    path = Path(source.path)
    if source.kind == "hub":
        return Path(EVALUATIONS) / source.path.replace("/", "--")
    if source.kind == "gguf":
        return path.parent / EVALUATIONS
    run = run_folder_of(path)
    if run is not None and (path == run or path.name == FINAL_MODEL or Path(model).expanduser() == run):
        return run / EVALUATIONS
    return path / EVALUATIONS


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise DTFError(
            f"{path}: cannot be written ({error.strerror}); name another place with --output FILE."
        ) from error
