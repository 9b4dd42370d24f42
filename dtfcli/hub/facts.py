"""Gathers what is known about a model to push: from its config, its weights, its run and its evaluations."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dtfcli.errors import CheckpointError, ConfigError, read_json_object
from dtfcli.evaluation.report import EvalReport
from dtfcli.loading.model_files import weights_hash
from dtfcli.models.configuration_fields import has_routed_mlps, resolve_routed_layers
from dtfcli.models.pretrained import ROUTED_TYPES, is_added
from dtfcli.runs.files import file_hash, read_metrics
from dtfcli.runs.folder import EVALUATIONS, FINAL_MODEL, MERGED_MODEL, METRICS_FILE
from dtfcli.runs.public import (
    own_evaluation,
    public_name,
    public_settings,
    public_sources,
    run_settings_table,
    without_local_traces,
)


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        named: the model folder that the user chose.
        folder: the folder to upload: `named`, or the adapter in it merged into its base.
        run: the run folder of `named`; None if it lies in none.
        base: Hub id of the base of an adapter; None for a plain model.
        config: content of config.json.
    """

    named: Path
    folder: Path
    run: Path | None
    base: str | None
    config: dict[str, Any]
    weights: list[Path]


@dataclass(frozen=True)
class ModelFacts:
    """The content of a model card, without paths and secrets.

    Attributes:
        config: the model's config.json.
        added_parameters: of the parts that routing adds.
        weights_sha256: of each weight file.
        revision: branch; None for the default branch.
        routed_layers: indices; empty for a dense model.
        base: Hub id or file name of the model that training started from. Empty: random weights. None: not known.
        base_on_hub: whether `base` is a Hub id.
        is_adapter: whether the files hold only adapters (LoRA) of `base` and the parts that routing adds.
        datasets: (Hub id or kind of local text, configuration, share kept, whether on the Hub) of each source.
        settings: of the run, without local paths; empty for a model without its run.
        evaluation: the line of metrics.jsonl that measured these weights.
        unigram: loss that token counts alone reach on the same text.
        has_curves: whether curves.png is uploaded with the card.
        results: of benchmarks.
        conversion: what `dtf convert` measured, its report.json; empty for other models.
        chats: whether the tokenizer has a chat template.
        version: of dtf.
    """

    repo: str
    config: dict[str, Any]
    parameters: int
    added_parameters: int
    weights_sha256: dict[str, str]
    revision: str | None = None
    routed_layers: list[int] = field(default_factory=list)
    base: str | None = None
    base_on_hub: bool = False
    is_adapter: bool = False
    datasets: list[tuple[str, str, float, bool]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    unigram: float | None = None
    has_curves: bool = False
    results: EvalReport | None = None
    conversion: dict[str, Any] = field(default_factory=dict)
    chats: bool = False
    version: str = ""

    @property
    def architecture(self) -> str:
        """dtf, mod or dense."""
        return self.config["architecture"] if self.routed_layers else "dense"

    @property
    def routes_mlps(self) -> bool:
        """Whether the model is a stock one with routed MLPs."""
        return bool(self.routed_layers) and has_routed_mlps(self.config)

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]


def gather_facts(
    source: LocalModel, repo: str, revision: str | None, results: EvalReport | None, has_curves: bool
) -> ModelFacts:
    """Everything that a card can say about a model.

    Raises:
        CheckpointError: a weight file or the run's settings are damaged.
    """
    parameters, added = _count_parameters(source.weights)
    run = source.run
    settings = run_settings_table(run) if run is not None else {}
    base, on_hub = public_name(settings.get("model", {}).get("base"), run) if settings else (None, False)
    if source.base is not None:
        base, on_hub = source.base, True
    conversion = _conversion(source.named)
    if base is None and conversion:
        name = str(conversion["model"])
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None  # a model on this machine has a bare name
        base = name if on_hub else Path(name).name
    lines = read_metrics(run / METRICS_FILE) if run is not None and (run / METRICS_FILE).is_file() else []
    return ModelFacts(
        repo=repo,
        config=without_local_traces(source.config),
        parameters=parameters,
        added_parameters=added,
        weights_sha256={path.name: file_hash(path) for path in source.weights},
        revision=revision if revision != "main" else None,
        routed_layers=_routed_layers(source.config),
        base=base,
        base_on_hub=on_hub,
        is_adapter=source.base is not None,
        datasets=public_sources(settings, run),
        settings=public_settings(settings, run),
        evaluation=own_evaluation(lines, source.named.name),
        unigram=next((line["val/unigram"] for line in lines if "val/unigram" in line), None),
        has_curves=has_curves,
        results=results,
        conversion=conversion,
        chats=_has_chat_template(source.folder),
        version=metadata.version("dtfcli"),
    )


def choose_results(source: LocalModel, given: Path | None) -> tuple[EvalReport | None, list[str]]:
    """The evaluation for the card, and warnings.

    Args:
        source: the model.
        given: JSON of an evaluation; None: take the newest in eval/ of the model, a causal one if there is any.

    Raises:
        ConfigError: the given one cannot be read, or measured other weights, or these in fewer bits.
    """
    # A merged model was measured as its adapter.
    run, measured_as = source.run, [source.named]
    if run is not None and source.named.name == MERGED_MODEL and (run / FINAL_MODEL).is_dir():
        measured_as.append(run / FINAL_MODEL)
    digests = [weights_hash(folder) for folder in measured_as]
    remedy = f"`dtf eval {source.named}`"
    if given is not None:
        return _given_results(given, digests, remedy)
    folders = [folder / EVALUATIONS for folder in (source.named, run) if folder is not None]
    files = [path for folder in folders for path in folder.glob("*.json") if path.is_file()]
    reports = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ConfigError):  # a damaged or foreign file does not stop a push
            report = EvalReport.read(path)
            reports += [report] if _digest(report) in digests and not report.quantize else []
    if files and not reports:
        return None, [f"{files[0].parent} has no results of these weights; {remedy} would add them to the card."]
    return next((report for report in reports if report.causal), reports[0] if reports else None), []


def _given_results(path: Path, digests: list[str], remedy: str) -> tuple[EvalReport, list[str]]:
    report, label = EvalReport.read(path), f"--eval-results {path}"
    if report.quantize:
        raise ConfigError(
            f"{label}: measured the model with weights in {report.quantize}, and plain ones are pushed; run {remedy} "
            "without --quantize."
        )
    measured = _digest(report)
    if measured is None:
        return report, [f"{label}: does not name the weights that it measured. Make sure that it was these."]
    if measured not in digests:
        raise ConfigError(
            f"{label}: measured other weights (model_hash {measured[:12]}…, this model has {digests[0][:12]}…); "
            f"run {remedy}."
        )
    return report, []


def _conversion(folder: Path) -> dict[str, Any]:
    """The report that `dtf convert` wrote into a model folder; empty if there is none, or another program's."""
    path = folder / "report.json"
    with suppress(CheckpointError):
        report = read_json_object(path, "convert the model again") if path.is_file() else {}
        if {"model", "dial", "chosen", "text"} <= report.keys():
            return report
    return {}


def _has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    with suppress(CheckpointError):
        settings = read_json_object(path, "save the tokenizer again") if path.is_file() else {}
        return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    return False


def _digest(report: EvalReport) -> str | None:
    digest = (report.model_hash or "").removeprefix("sha256:").lower()
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _routed_layers(config: dict[str, Any]) -> list[int]:
    if not str(config.get("model_type", "")).startswith(ROUTED_TYPES):
        return []
    return resolve_routed_layers(config["routed_layers"], config["dense_edges"], config["num_hidden_layers"])


def _count_parameters(weights: list[Path]) -> tuple[int, int]:
    """All parameters, and the parameters of routing, from the headers of the weight files."""
    from safetensors import safe_open

    total = added = 0
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    size = math.prod(file.get_slice(name).get_shape())
                    if "threshold" in name or name.endswith("router.shares"):  # a table, not a parameter
                        continue
                    total += size
                    added += size * is_added(name)
        except Exception as error:  # SafetensorError, whose place in the library has moved
            raise CheckpointError(f"{path}: not a safetensors file ({error}); save the model again.") from error
    return total, added
