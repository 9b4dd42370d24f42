"""The metadata in front of a model card, which the Hub reads and validates."""

import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dtfcli.evaluation.report import EvalReport, TaskScore
from dtfcli.hub.facts import ModelFacts
from dtfcli.loading.base_configs import base_license

_DATASETS: dict[str, tuple[str, str | None]] = {"mmlu": ("cais/mmlu", "all")}
"""Data sets of groups, for which lm-eval names none."""
_TAGS = {"dtf": ["dtf", "dynamic-transformer"], "mod": ["mod"], "random": ["mod"], "layerdrop": ["layerdrop"]}
_DATASET = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?: \(([\w.-]+)\))?")
"""owner/name (configuration), as reports name a data set of the Hub."""


def card_metadata(facts: ModelFacts) -> ModelCardData:
    """The header: base model, license, data sets, tags and results, as far as they are known."""
    on_hub = facts.base if facts.base_on_hub else None
    tags = [*_TAGS.get(facts.architecture, [])]
    if facts.routed_layers:
        tags += ["mixture-of-depths", "conditional-computation"]
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


def check_metadata(card: ModelCard, data: ModelCardData) -> None:
    """Check without the Hub that the metadata reads back unchanged, and that ids are valid.

    Raises:
        ValueError: one of the two fails.
    """
    if card.data.to_dict() != data.to_dict():
        raise ValueError("the metadata of the model card changes when it is written")
    try:
        for name in [*(card.data.get("datasets") or []), *filter(None, [card.data.get("base_model")])]:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"the model card names an invalid Hub id: {error}") from error


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
                    metric_name=", ".join([shown_metric(name), *_conditions(score, report, facts)]),
                    metric_config=None if report.causal else "not causal (top-k routing)",
                )
            )
    return entries


def _conditions(score: TaskScore, report: EvalReport, facts: ModelFacts) -> list[str]:
    """How a figure was measured, as far as it is not a matter of course."""
    notes = [f"{score.shots}-shot"] if score.shots is not None else []
    if score.n_total is not None and 0 < score.n < score.n_total:
        notes.append(f"{score.n} of {score.n_total} items")
    if isinstance(report.capacity, float) and report.capacity != facts.config.get("capacity"):
        notes.append(f"γ = {report.capacity:g}")
    return notes if report.causal else [*notes, "not causal: top-k routing"]


def shown_metric(metric: str) -> str:
    """`exact_match,strict` → `exact_match (strict)`."""
    name, comma, kind = metric.partition(",")
    return f"{name} ({kind})" if comma else name
