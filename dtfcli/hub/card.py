"""Writes the model card (README.md) of a pushed model from the facts about it; its text is in `card.md.jinja`.

The card reports measurements with their conditions, and leaves out what is not known. It states a license only if the
base has one, and names a data set only if it is on the Hub.
"""

import math
import re
from pathlib import Path
from typing import Any

import tomlkit
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dtfcli.evaluation.report import EvalReport, TaskScore
from dtfcli.hub.facts import ModelFacts
from dtfcli.loading.base_configs import base_license
from dtfcli.models.configuration_fields import RoutingFields, unread_fields
from dtfcli.runs.folder import CURVES_FILE

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_FEW_TOKENS = 1_000_000_000
_DATASETS: dict[str, tuple[str, str | None]] = {"mmlu": ("cais/mmlu", "all")}
"""Data sets of groups, for which lm-eval names none."""
_TAGS = {"dtf": ["dtf", "dynamic-transformer"], "mod": ["mod"], "random": ["mod"], "layerdrop": ["layerdrop"]}
_DATASET = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?: \(([\w.-]+)\))?")
"""owner/name (configuration), as reports name a data set of the Hub."""

Rows = list[tuple[Any, ...]]
"""Of a table of the card."""


def model_card(facts: ModelFacts) -> ModelCard:
    """The card, metadata first."""
    data, seen = _metadata(facts), facts.evaluation.get("tokens")
    return ModelCard.from_template(
        data,
        str(_TEMPLATE),
        facts=facts,
        config=facts.config,
        size=_rounded(facts.parameters),
        base=_base(facts),
        capacity=_capacity(facts),
        lower_capacity=_lower_capacity(facts),
        score=facts.config.get("score", RoutingFields.score),
        has_code="auto_map" in facts.config,
        routing_rows=_routing_rows(facts) if facts.routed_layers else [],
        training=facts.settings.get("training", {}),
        data=facts.settings.get("data", {}),
        training_rows=_training_rows(facts) if facts.settings else [],
        data_rows=[
            (f"[{name}](https://huggingface.co/datasets/{name})" if hub else name, configuration or "–", f"{share:g}")
            for name, configuration, share, hub in facts.datasets
        ],
        curves_file=CURVES_FILE,
        all_settings=tomlkit.dumps(facts.settings).strip(),
        loss_rows=_loss_rows(facts),
        conditions=_conditions(facts.results) if facts.results is not None else [],
        score_rows=_score_rows(facts.results) if facts.results is not None else [],
        dial_rows=_dial_rows(facts.conversion) if facts.conversion else [],
        few_tokens=seen if facts.base == "" and seen and seen < _FEW_TOKENS else None,
        license=data.license,
    )


def _rounded(number: int) -> str:
    """1,234,567 as 1.2M."""
    if number < 1000:
        return str(number)
    power = min(3, int(math.log10(number) // 3))
    return f"{number / 1000**power:.1f}{' KMB'[power]}"


def _base(facts: ModelFacts) -> str:
    if not facts.base:
        return "random weights"
    return f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base_on_hub else facts.base


def _capacity(facts: ModelFacts) -> str:
    capacity = facts.config.get("capacity", RoutingFields.capacity)
    return (
        f"{', '.join(f'{share:g}' for share in capacity)} by layer" if isinstance(capacity, list) else f"{capacity:g}"
    )


def _lower_capacity(facts: ModelFacts) -> float | None:
    """A γ to try, below the model's own: of a converted model the next on its dial, of others a usual one."""
    if not facts.conversion:
        own, usual = facts.config.get("capacity", RoutingFields.capacity), 0.5 if facts.routes_mlps else 0.25
        return usual if usual < (min(own) if isinstance(own, list) else own) else None
    saving = facts.conversion["chosen"]["saving"]
    lower = [point["capacity"] for point in facts.conversion["dial"] if point["saving"] > saving + 0.02]
    return round(max(lower), 2) if lower else None


def _routing_rows(facts: ModelFacts) -> Rows:
    """How tokens are routed, by the fields that such a model reads; then its size and its files."""
    config = facts.config
    unread = unread_fields({**config, "architecture": facts.architecture})
    fields = {
        "routed_part": ("routed part", "{}"),
        "score": ("score", "`{}`"),
        "gate": ("gate", "`{}`"),
        "bypass": ("tokens that skip take", "{}"),
        "sink_tokens": ("sink tokens", "{}"),
        "kv_tokens": ("keys and values of", "{} tokens"),
    }
    return [
        ("architecture", f"{facts.architecture}, `{config.get('model_type', '')}`"),
        ("layers", f"{config['num_hidden_layers']}, of which route: {', '.join(map(str, facts.routed_layers))}"),
        ("capacity γ", _capacity(facts)),
        ("routing mode", f"`{config.get('routing', 'threshold')}`"),
        *(
            (label, form.format(config[name]))
            for name, (label, form) in fields.items()
            if name in config and name not in unread
        ),
        (
            "parameters here" if facts.is_adapter else "parameters",
            f"{facts.parameters:,}, of which {facts.added_parameters:,} belong to the routing",
        ),
        *((f"sha256 of {name}", f"`{digest}`") for name, digest in facts.weights_sha256.items()),
    ]


def _training_rows(facts: ModelFacts) -> Rows:
    training, metrics = facts.settings.get("training", {}), facts.evaluation
    rows = [
        ("start", _base(facts)),
        ("steps", f"{metrics['step']:,}, {metrics.get('tokens', 0):,} tokens" if "step" in metrics else ""),
        ("sequence length", str(facts.settings.get("data", {}).get("seq_len", ""))),
        ("tokens per step", f"{training['tokens_per_update']:,}" if training.get("tokens_per_update") else ""),
        ("peak learning rates", ", ".join(f"{k} {v:g}" for k, v in training.get("learning_rates", {}).items())),
        ("schedule", f"{training.get('schedule', '')}, warm-up {training.get('warmup_ratio', 0):g}"),
        ("weight decay", f"{training.get('weight_decay', 0):g}"),
        ("seed", str(facts.settings.get("run", {}).get("seed", ""))),
    ]
    return [row for row in rows if row[1]]


def _loss_rows(facts: ModelFacts) -> Rows:
    """On held-out text of the training data."""
    metrics = facts.evaluation
    losses = (
        ("loss", "val/loss", "nats per token; causal" if facts.routed_layers else "nats per token"),
        ("loss with top-k", "val/loss_topk", "**not causal**"),
        ("bits per byte", "val/bits_per_byte", ""),
    )
    rows: Rows = [(name, f"{metrics[key]:.4f}", remark) for name, key, remark in losses if metrics.get(key) is not None]
    if rows and facts.unigram is not None:
        rows.append(("loss of token counts alone", f"{facts.unigram:.4f}", "a model must be below it"))
    shares = [value for key, value in metrics.items() if re.fullmatch(r"router/\d+/routed_share", key) and value]
    if shares:
        spread = f"{min(shares):.3f} to {max(shares):.3f} by layer"
        rows.append(("routed share", f"{sum(shares) / len(shares):.3f}", spread))
    return rows


def _dial_rows(report: dict[str, Any]) -> Rows:
    """What each saving costs, as `dtf convert` measured it; the model's own γ in bold."""
    chosen = report["chosen"]
    points = [point for point in report["dial"] if point["capacity"] != chosen["capacity"]]
    rows: Rows = []
    for point in sorted([*points, chosen], key=lambda point: point["saving"]):
        error = "" if point["stderr"] is None else f" ± {point['stderr']:.4f}"
        shares = (f"{point[name]:.3f}" for name in ("agreement", "kl", "routed_share"))
        mark = "**" if point is chosen else ""
        saved, capacity = f"{mark}{point['saving']:.1%}{mark}", f"{point['capacity']:.3f}"
        rows.append((saved, capacity, f"{point['loss_gap']:+.4f}{error}", *shares, f"{point['tokens']:,}"))
    return rows


def _overall(share: dict[str, Any] | None) -> float | None:
    """The routed share over all layers, if it was measured."""
    value = share.get("overall") if share is not None else None
    return value if isinstance(value, float) else None


def _conditions(report: EvalReport) -> list[str]:
    """How the benchmarks were measured."""
    conditions = []
    if report.routing not in ("", "dense"):
        causal = "causal" if report.causal else "**not causal: a token's path depends on the tokens after it**"
        conditions.append(f"routing `{report.routing}` ({causal})")
    if isinstance(report.capacity, float):
        conditions.append(f"γ = {report.capacity:g}")
    if (share := _overall(report.routed_share)) is not None:
        conditions.append(f"{share:.3f} of the tokens routed")
    if report.seed is not None:
        conditions.append(f"seed {report.seed}")
    return conditions + [f"{name} {version}" for name, version in report.versions.items() if name == "lm_eval"]


def _score_rows(report: EvalReport) -> Rows:
    mark = "" if report.causal else " (not causal)"
    rows: Rows = []
    for task, score in report.results.items():
        shots = "–" if score.shots is None else str(score.shots)
        if score.fewshot_from and score.shots:
            shots += f" ({score.fewshot_from})"
        share = _overall(score.routed_share)
        n = f"{score.n:,}" if score.n else "–"
        if score.n_total is not None and score.n_total != score.n:
            n += f" of {score.n_total:,}"
        for name, metric in score.metrics.items():
            error = f" ± {metric.stderr:.4f}" if metric.stderr is not None else ""
            value = f"{metric.value:.4f}{error}"
            rows.append((task, _shown_metric(name) + mark, value, n, shots, "–" if share is None else f"{share:.3f}"))
    return rows


def _metadata(facts: ModelFacts) -> ModelCardData:
    """The header: base model, license, data sets, tags and results, as far as they are known."""
    on_hub = facts.base if facts.base_on_hub else None
    tags = [*_TAGS.get(facts.architecture, [])]
    if facts.routed_layers:
        tags += [*(() if facts.routes_mlps else ("mixture-of-depths",)), "conditional-computation"]
    if facts.is_adapter:
        tags.append("lora")
    if "auto_map" in facts.config:
        tags.append("custom_code")
    return ModelCardData(
        base_model=on_hub,
        base_model_relation=("adapter" if facts.is_adapter else "finetune") if on_hub else None,
        datasets=list(dict.fromkeys(name for name, _, _, hub in facts.datasets if hub)) or None,
        eval_results=_model_index(facts) or None,
        library_name="peft" if facts.is_adapter else "transformers",
        license=base_license(on_hub) if on_hub else None,
        model_name=facts.name if facts.results is not None else None,
        pipeline_tag="text-generation",
        tags=tags or None,
    )


def _model_index(facts: ModelFacts) -> list[EvalResult]:
    """Every figure of the evaluation; the names of figures that are not causal say so."""
    report = facts.results
    if report is None:
        return []
    entries = []
    for task, score in report.results.items():
        # A task without a data set on the Hub stands for its data set.
        match = _DATASET.fullmatch(score.dataset or "")
        dataset, configuration = match.groups() if match else _DATASETS.get(task, (task, None))
        for name, metric in score.metrics.items():
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=dataset,
                    dataset_name=task,
                    dataset_config=configuration,
                    dataset_split=score.split,
                    dataset_args={"num_few_shot": score.shots} if score.shots is not None else None,
                    metric_type=name.partition(",")[0],
                    metric_value=metric.value,
                    metric_name=", ".join([_shown_metric(name), *_figure_conditions(score, report, facts)]),
                    metric_config=None if report.causal else "not causal (top-k routing)",
                )
            )
    return entries


def _figure_conditions(score: TaskScore, report: EvalReport, facts: ModelFacts) -> list[str]:
    """How a figure was measured, as far as it is not a matter of course."""
    notes = [f"{score.shots}-shot"] if score.shots is not None else []
    if score.n_total is not None and 0 < score.n < score.n_total:
        notes.append(f"{score.n} of {score.n_total} items")
    if isinstance(report.capacity, float) and report.capacity != facts.config.get("capacity"):
        notes.append(f"γ = {report.capacity:g}")
    return notes if report.causal else [*notes, "not causal: top-k routing"]


def _shown_metric(metric: str) -> str:
    """`exact_match,strict` → `exact_match (strict)`."""
    name, comma, kind = metric.partition(",")
    return f"{name} ({kind})" if comma else name
