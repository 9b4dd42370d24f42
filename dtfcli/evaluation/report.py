"""What an evaluation found, as a document: figures next to everything they depend on.

`EvalReport.read` reads such a document back, and lm-eval's own result files as far as they go.
"""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dtfcli.errors import ConfigError, plain, read_json_object, reading
from dtfcli.loading.model_files import weights_hash
from dtfcli.loading.quantization import plain_tensors
from dtfcli.loading.source import ModelSource
from dtfcli.models.configuration_fields import CAUSAL_MODES, ROUTING_MODES
from dtfcli.runs.files import explained_write_errors, is_writable, nearest, replaced_file
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
        n, n_total: items scored, and in the split.
        shots: few-shot examples in a prompt.
        fewshot_from: the split of these examples, or "the task" for examples in the task's file; None at 0 shots, or
            where tasks of a group differ. "(item excluded)" follows a split that is also the scored one.
        split: the scored one.
        dataset: Hub id and configuration, as `owner/name (configuration)`.
        data_source: "data-dir", "hub", "task" or "run".
        missing_splits: splits that the task names and its dataset lacks.
        routed_share: of each layer, by position and overall; None for a dense model. Members of a group are scored
            together: they have no routed_share, truncated and seconds of their own.
        truncated: requests that exceeded the model's positions and lost their beginning.
        seconds: spent on the answers, earlier attempts included.
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
    """The values of single items: by metric in the order of `hashes`, and the function from values to score."""

    hashes: tuple[str, ...]
    values: dict[str, list[Any]]
    aggregate: dict[str, Callable[[list[Any]], float]]


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """All scores of one model, and the conditions of the evaluation; lm-eval's own files leave many of them out.

    Attributes:
        model: as the user named it.
        model_hash: sha256 over its weights.
        routing: mode; "dense" for a dense model.
        causal: whether no token's path depended on later ones.
        capacity: γ of the evaluation; None for a dense model.
        routed_share: over all tasks.
        tasks: names as the user gave them.
        results: by task and group.
        skipped: tasks without data, with the reason.
        limit, num_fewshot: None: each task's own.
        batch_size: rows; "auto" where they were fitted to memory.
        seconds: of this run of the command.
        reused: requests answered by an earlier run that was stopped.
        quantize: int8, where the model's weights were quantized for the evaluation.
        quantization: what that changed (`loading.quantization.Quantization`).
        items: for a comparison with another model; not part of the document.
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
    def read(cls, path: Path) -> "EvalReport":
        """Read a document that `dtf eval` or lm-eval wrote; figures that are not finite are left out.

        Raises:
            ConfigError: the file is missing, not JSON, or without results.
        """
        remedy = "give the JSON that `dtf eval` wrote"
        with reading(path, remedy, ConfigError):
            if not path.exists():
                raise ConfigError(f"{path}: no such file; `dtf eval MODEL` writes one (eval/latest.json).")
            document = plain(read_json_object(path, remedy, ConfigError))
            if not isinstance(document.get("results"), dict):
                raise ConfigError(f'{path}: has no "results"; {remedy}.')
            if not any("metrics" in _table(entry) for entry in document["results"].values()):
                document = _from_lm_eval(document)
            results = {Path(name).name: _finite(entry) for name, entry in document["results"].items()}
            share = document.get("routed_share")
            share = share if isinstance(share, dict) else None
            document = _without_none(document | {"results": results, "routed_share": share, "items": None})
        if not document["results"]:
            raise ConfigError(f'{path}: its "results" hold no figure; run `dtf eval` again.')
        try:
            report = TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}: {place}: {first['msg']}; run `dtf eval` again.") from error
        return replace(report, causal=report.causal and is_causal(report.routing))


def _without_none(value: Any) -> Any:
    """A table without its empty entries, which then take their defaults."""
    if not isinstance(value, dict):
        return value
    return {name: _without_none(item) for name, item in value.items() if item is not None}


def _finite(entry: Any) -> dict[str, Any] | None:
    """A task's entry with the metrics that have a value; None without any, as for a group that only holds others."""
    metrics = _table(entry, "metrics").items()
    finite = {name: metric for name, metric in metrics if _number(_table(metric).get("value")) is not None}
    return {**entry, "metrics": finite} if finite else None


def _table(document: Any, *keys: str) -> dict[str, Any]:
    """The table at a place in a document; an empty one where there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _from_lm_eval(document: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's own document in the form of ours, as far as it goes."""
    results: dict[str, Any] = {}
    for name, entry in document["results"].items():
        figures = {key: value for key, value in _table(entry).items() if "," in key}
        metrics = {
            key.removesuffix(",none"): {"value": value, "stderr": _number(figures.get(key.replace(",", "_stderr,", 1)))}
            for key, value in figures.items()
            if "_stderr," not in key
        }
        counts, config = _table(document, "n-samples", name), _table(document, "configs", name)
        path, part = config.get("dataset_path"), config.get("dataset_name")
        results[name] = {
            "metrics": metrics,
            "n": counts.get("effective") or 0,
            "n_total": counts.get("original"),
            "shots": _table(document, "n-shot").get(name),
            "dataset": f"{path} ({part})" if path and part else path,
        }
    arguments = str(_table(document, "config").get("model_args"))  # "routing=topk,…", or a table
    routing = re.search(r"\brouting\W+(\w+)", arguments)
    versions = {name: document.get(f"{name}_version") for name in ("lm_eval", "transformers")}
    return {"results": results, "routing": routing[1] if routing else None, "versions": versions}


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


def shares_of(meter: ShareMeter) -> dict[str, Any] | None:
    """The shares that a meter has read, as plain values; None where nothing was routed."""
    return plain(asdict(meter.read())) if meter.counts() else None


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
    return next((folder for folder in (path, path.parent) if (folder / SETTINGS_FILE).is_file()), None)


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
    if not is_writable(parent := nearest(folder)):
        raise ConfigError(f"{folder}: results cannot be written there ({parent} is not writable); give --output FILE.")


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
    with explained_write_errors(path, "name another place with --output FILE"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n", "utf-8")
