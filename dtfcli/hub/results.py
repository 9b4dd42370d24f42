"""Reads evaluation results: what `dtf eval` writes, and what lm-eval writes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError
from dtfcli.runs.public import looks_like_a_path

_HASH = re.compile(r"[0-9a-f]{64}")
_DATASET = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?: \(([\w.-]+)\))?")
_NON_CAUSAL = "topk"


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        metric: its name, the filter included where there is one: acc, exact_match (strict-match).
        value: as measured.
        stderr: its standard error, where known.
    """

    metric: str
    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task.

    Attributes:
        task: its name in lm-eval.
        scores: at least one.
        n: items scored; n_total: items there are.
        shots: examples in the prompt.
        fewshot_source: where these came from.
        routed_share: of the tokens, over the routed layers.
        dataset: Hub id and configuration of what was scored, where the file names them.
        split: of it.
    """

    task: str
    scores: list[Score]
    n: int | None = None
    shots: int | None = None
    fewshot_source: str | None = None
    routed_share: float | None = None
    n_total: int | None = None
    dataset: tuple[str, str | None] | None = None
    split: str | None = None


@dataclass(frozen=True)
class EvalResults:
    """One evaluation.

    Attributes:
        tasks: in the order of the file.
        routing: the mode; None for a dense model, which is causal, and where the file does not say.
        capacity: γ it was measured at.
        routed_share: overall.
        seed: of the evaluation.
        model_hash: sha256 of the evaluated weights; None in a file of lm-eval.
        versions: of the libraries.
    """

    tasks: list[TaskResult]
    routing: str | None = None
    capacity: Any = None
    routed_share: float | None = None
    seed: int | None = None
    model_hash: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether no token's path depended on later tokens."""
        return self.routing != _NON_CAUSAL


def read_results(path: Path, label: str) -> EvalResults:
    """Read a file of results.

    Args:
        path: of a JSON file written by `dtf eval` or lm-eval.
        label: what to call it in messages, such as "--eval-results FILE".

    Raises:
        ConfigError: it is missing, no JSON, or holds no results.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{label}: there is no such file; `dtf eval MODEL` writes one (eval/latest.json).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label}: cannot be read ({error}); give the JSON that `dtf eval` wrote.") from error
    except ValueError as error:
        raise ConfigError(f"{label}: not valid JSON ({error}); give the JSON that `dtf eval` wrote.") from error
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict):
        raise ConfigError(f'{label}: has no "results"; give the JSON that `dtf eval` or lm-eval wrote.')
    tasks = [task for name, entry in results.items() if (task := _task(str(name), entry, document)) is not None]
    if not tasks:
        raise ConfigError(f'{label}: its "results" hold no figure; run `dtf eval` again.')
    routing = document.get("routing") or _argument(document, "routing")
    routing = None if routing == "dense" else routing
    if document.get("causal") is False:
        routing = _NON_CAUSAL
    share = document.get("routed_share")
    claimed = str(document.get("model_hash", "")).removeprefix("sha256:").lower()
    return EvalResults(
        tasks=tasks,
        routing=str(routing) if routing else None,
        capacity=document.get("capacity"),
        routed_share=_number(share.get("overall") if isinstance(share, dict) else share),
        seed=_whole(document.get("seed")),
        model_hash=claimed if _HASH.fullmatch(claimed) else None,
        versions=_versions(document),
    )


def _task(name: str, entry: Any, document: Mapping[str, Any]) -> TaskResult | None:
    """A task's figures; None where it has none, such as a group that only holds others."""
    if not isinstance(entry, dict):
        return None
    metrics = entry.get("metrics")
    scores = _own_scores(metrics) if isinstance(metrics, dict) else _stock_scores(entry)
    if not scores:
        return None
    counts, shots = _table(_table(document, "n-samples"), name), _table(document, "n-shot").get(name)
    share, split = entry.get("routed_share"), entry.get("split")
    source = entry.get("fewshot_from", entry.get("fewshot_source"))
    return TaskResult(
        task=Path(name).name,
        scores=scores,
        n=_whole(entry.get("n", counts.get("effective"))),
        n_total=_whole(entry.get("n_total", counts.get("original"))),
        shots=_whole(entry.get("shots", entry.get("num_fewshot", shots))),
        fewshot_source=source if isinstance(source, str) and not looks_like_a_path(source) else None,
        routed_share=_number(share.get("overall") if isinstance(share, dict) else share),
        dataset=_dataset(entry, name, document),
        split=split if isinstance(split, str) else None,
    )


def _dataset(entry: Mapping[str, Any], name: str, document: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Hub id and configuration: in `dtf eval`'s "owner/name (configuration)", or in lm-eval's record of its tasks."""
    stock = _table(_table(document, "configs"), name)
    named = entry.get("dataset") or stock.get("dataset_path")
    found = _DATASET.fullmatch(named) if isinstance(named, str) else None
    if found is None:
        return None
    configuration = found.group(2) or stock.get("dataset_name")
    return found.group(1), configuration if isinstance(configuration, str) else None


def _own_scores(metrics: Mapping[str, Any]) -> list[Score]:
    scores = []
    for name, entry in metrics.items():
        value = _number(entry.get("value") if isinstance(entry, dict) else entry)
        if value is not None:
            scores.append(
                Score(_metric(name), value, _number(entry.get("stderr") if isinstance(entry, dict) else None))
            )
    return scores


def _stock_scores(entry: Mapping[str, Any]) -> list[Score]:
    """Figures as lm-eval writes them: "acc,none" and "acc_stderr,none" side by side."""
    scores = []
    for key, value in entry.items():
        name, comma, kind = key.partition(",")
        figure = _number(value)
        if comma and not name.endswith("_stderr") and figure is not None:
            scores.append(Score(_metric(key), figure, _number(entry.get(f"{name}_stderr,{kind}"))))
    return scores


def _metric(key: str) -> str:
    name, _, kind = key.partition(",")
    return f"{name} ({kind})" if kind and kind != "none" else name


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _argument(document: Mapping[str, Any], name: str) -> str | None:
    """A value from lm-eval's record of `--model_args`."""
    arguments = _table(document, "config").get("model_args")
    if isinstance(arguments, dict):
        return arguments.get(name)
    found = re.search(rf"(?:^|,){name}=([^,]+)", arguments) if isinstance(arguments, str) else None
    return found.group(1) if found else None


def _versions(document: Mapping[str, Any]) -> dict[str, str]:
    """Versions of libraries; lm-eval's own table of that name holds versions of tasks, which are numbers."""
    own = {name: value for name, value in _table(document, "versions").items() if isinstance(value, str)}
    stock = {"lm_eval": document.get("lm_eval_version"), "transformers": document.get("transformers_version")}
    return own or {name: value for name, value in stock.items() if isinstance(value, str)}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
