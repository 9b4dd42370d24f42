"""The model card (README.md) of a pushed model: a pure function of what is known about it.

The card says what was measured and how, and leaves out what is not known: no license is invented for a model that
does not inherit one, and no data set is named that is not on the Hub.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import tomlkit
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dtfcli.hub.results import EvalResults, Score, TaskResult
from dtfcli.loading.base_configs import base_license

CURVES_FILE = "curves.png"
_FEW_TOKENS = 1_000_000_000

_LONG_NAMES = {"dtf": "Dynamic Transformer (DTF)", "mod": "Mixture-of-Depths (MoD)"}
_TAGS = {"dtf": ["dtf", "dynamic-transformer"], "mod": ["mod"]}
_DATASETS: dict[str, tuple[str, str | None]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "gsm8k": ("openai/gsm8k", "main"),
    "hellaswag": ("Rowan/hellaswag", None),
    "humaneval": ("openai/openai_humaneval", None),
    "mmlu": ("cais/mmlu", "all"),
    "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}
"""What `dtf eval`'s suites score, for result files that do not say; any other task stands for its data set."""

_CITATIONS = {
    "dtf": """@mastersthesis{wieser2025dynamic,
  title  = {Dynamic Transformers},
  author = {Wieser},
  school = {University College London},
  year   = {2025},
  note   = {Sequel: arXiv:2511.21408}
}""",
    "mod": """@misc{raposo2024mixture,
  title         = {Mixture-of-Depths: Dynamically allocating compute in transformer-based language models},
  author        = {Raposo, David and others},
  year          = {2024},
  eprint        = {2404.02258},
  archivePrefix = {arXiv}
}""",
}


@dataclass(frozen=True)
class ModelFacts:
    """What a card is made of; nothing in it is a path or a secret.

    Attributes:
        repo: owner/name.
        config: the model's config.json.
        parameters, added_parameters: of all, and of routers, priors and predictors.
        weights_sha256: of each weight file.
        revision: branch, where it is not the default.
        routed_layers: indices; empty for a dense model.
        base: Hub id, or name of the file, that training started from; empty: from scratch; None: not known.
        base_on_hub: whether `base` is a Hub id.
        is_adapter: whether these are adapters (LoRA) of `base` alone, and what routing adds to it.
        datasets: (Hub id or kind of local text, configuration, share kept, on the Hub) of each source.
        settings: of the run, without local paths; empty where the model comes without its run.
        evaluation: the line of metrics.jsonl that these weights were measured in.
        unigram: loss that counts of tokens alone reach on the same text.
        has_curves: whether curves.png lies beside the card.
        results: of benchmarks.
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
    results: EvalResults | None = None
    version: str = ""

    @property
    def architecture(self) -> str:
        """dtf, mod or dense."""
        return self.config["architecture"] if self.routed_layers else "dense"

    @property
    def name(self) -> str:
        """Of the repository, without its owner."""
        return self.repo.rpartition("/")[2]


def model_card(facts: ModelFacts) -> ModelCard:
    """The card, with metadata in front.

    Raises:
        ValueError: its metadata would not be valid.
    """
    body = [
        f"# {facts.name}",
        _summary(facts),
        _usage(facts),
        _how_it_routes(facts),
        _training(facts),
        _evaluation(facts),
        _limits(facts),
        _citation(facts),
    ]
    data = _metadata(facts)
    text = "\n\n".join(part.strip() for part in body if part)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    _check(card, data)
    return card


def _metadata(facts: ModelFacts) -> ModelCardData:
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


def _check(card: ModelCard, data: ModelCardData) -> None:
    """What can be checked without the Hub: the header is read back as it was meant, and ids are ids.

    Raises:
        ValueError: says what is wrong.
    """
    if card.data.to_dict() != data.to_dict():
        raise ValueError("the metadata of the model card does not survive being written")
    try:
        for name in [*(card.data.get("datasets") or []), *filter(None, [card.data.get("base_model")])]:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"the model card names no valid Hub id: {error}") from error


def _model_index(facts: ModelFacts) -> list[EvalResult]:
    """Every figure of the evaluation; those that were not measured causally say so in their name."""
    results = facts.results
    if results is None:
        return []
    entries = []
    for result in results.tasks:
        dataset, configuration = result.dataset or _DATASETS.get(result.task, (result.task, None))
        for score in result.scores:
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=dataset,
                    dataset_name=result.task,
                    dataset_config=configuration,
                    dataset_split=result.split,
                    dataset_args={"num_few_shot": result.shots} if result.shots is not None else None,
                    metric_type=score.metric.partition(" ")[0],
                    metric_value=score.value,
                    metric_name=_metric_name(score, result, facts),
                    metric_config=None if results.causal else "not causal (top-k routing)",
                )
            )
    return entries


def _metric_name(score: Score, result: TaskResult, facts: ModelFacts) -> str:
    results = facts.results
    assert results is not None
    notes = [f"{result.shots}-shot"] if result.shots is not None else []
    if result.n is not None and result.n_total is not None and result.n < result.n_total:
        notes.append(f"{result.n} of {result.n_total} items")
    if isinstance(results.capacity, (int, float)) and results.capacity != facts.config.get("capacity"):
        notes.append(f"γ = {results.capacity:g}")
    if not results.causal:
        notes.append("not causal: top-k routing")
    return f"{score.metric}, {', '.join(notes)}" if notes else score.metric


def _summary(facts: ModelFacts) -> str:
    size = f"{_count(facts.parameters)} parameters"
    if facts.is_adapter:
        kind = f"make it a **{_LONG_NAMES[facts.architecture]}**" if facts.routed_layers else "adapt it"
        routed = f", in which {len(facts.routed_layers)} of {facts.config['num_hidden_layers']} layers process only "
        routed += f"some of the tokens, {_capacity(facts)}"
        return (
            f"LoRA adapters of {size} for {_base(facts)} that {kind}{routed if facts.routed_layers else ''}. They were "
            f"trained with dtf {facts.version}."
        )
    if not facts.routed_layers:
        made = f"trained from {_base(facts)}" if facts.base is not None else "saved"
        return f"A dense language model of {size}, {made} with dtf {facts.version}: a baseline for routed models."
    long_name = _LONG_NAMES[facts.architecture]
    made = f"trained from {_base(facts)}" if facts.base is not None else "saved"
    return (
        f"A **{long_name}** of {size}: {len(facts.routed_layers)} of its {facts.config['num_hidden_layers']} layers "
        f"process only some of the tokens, {_capacity(facts)}. It was {made} with dtf {facts.version}."
    )


def _base(facts: ModelFacts) -> str:
    if not facts.base:
        return "random weights"
    if facts.base_on_hub:
        return f"[{facts.base}](https://huggingface.co/{facts.base})"
    return facts.base


def _capacity(facts: ModelFacts) -> str:
    capacity = facts.config.get("capacity", 0.5)
    if isinstance(capacity, list):
        return f"a share of γ = {', '.join(f'{share:g}' for share in capacity)} by layer"
    return f"a share of γ = {capacity:g}"


def _usage(facts: ModelFacts) -> str:
    trust = ", trust_remote_code=True" if "auto_map" in facts.config else ""
    revision = f', revision="{facts.revision}"' if facts.revision else ""
    routed_adapter = facts.is_adapter and bool(facts.routed_layers)
    loader = [
        "import dtfcli",
        "",
        f'tokenizer = dtfcli.load_tokenizer("{facts.repo}"{revision})',
        f'model = dtfcli.load_model("{facts.repo}"{revision})',
    ]
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}"{revision}{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}"{revision}{trust})',
    ]
    lines = loader if routed_adapter else lines
    lines += [
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))",
    ]
    if facts.routed_layers:
        lines += ["", 'model.set_routing("threshold", capacity=0.25)  # route fewer tokens, without retraining']
    at = f"@{facts.revision}" if facts.revision else ""
    command = f'dtf generate {facts.repo}{at} "Once upon a time"'
    code = "\n".join(lines)
    remark = ""
    if trust:
        library = facts.config.get("transformers_version", "")
        remark = (
            "The model's code travels with its weights, so that `dtf` need not be installed"
            f"{f' (saved with Transformers {library})' if library else ''}. "
        )
    elif routed_adapter:
        remark = (
            f"`dtf` loads {_base(facts)} and makes of it what these files say. Transformers and peft alone would load "
            "the base without its routing. "
        )
    return f"## Use\n\n```python\n{code}\n```\n\n{remark}Where `dtf` is installed:\n\n```\n{command}\n```"


def _how_it_routes(facts: ModelFacts) -> str:
    if not facts.routed_layers:
        return ""
    config = facts.config
    rows = [
        ("architecture", f"{facts.architecture}, `{config.get('model_type', '')}`"),
        ("layers", f"{config['num_hidden_layers']}, of which route: {', '.join(map(str, facts.routed_layers))}"),
        ("capacity γ", _capacity(facts).removeprefix("a share of γ = ")),
        ("routing mode", f"`{config.get('routing', 'threshold')}`"),
        ("gate", f"`{config.get('gate')}`"),
        ("sink tokens", str(config.get("sink_tokens"))),
        ("keys and values of", f"{config.get('kv_tokens')} tokens"),
        (
            "parameters" + (" here" if facts.is_adapter else ""),
            f"{facts.parameters:,}, of which {facts.added_parameters:,} decide where to compute",
        ),
        *((f"sha256 of {name}", f"`{digest}`") for name, digest in facts.weights_sha256.items()),
    ]
    if facts.architecture == "dtf":
        how = (
            "A routed layer takes a token when the decision layer below it was surprised by it: its output differs "
            "from its input more than a small prior network expected, or more than it did for the tokens before."
        )
    else:
        how = "A routed layer takes a token when its linear router scores it high enough."
    stored = "leave no keys and values there" if config.get("kv_tokens") == "routed" else "only offer keys and values"
    predictor = (
        "\n- `predictor` (causal): a small network foretells from the layer's input whether the training rule would."
        if config.get("predictor_loss_weight")
        else ""
    )
    return f"""## How it routes

{how} The others pass through unchanged and {stored}.

{_table(["", ""], rows)}

- `threshold` (causal): a token is routed when its score exceeds the layer's calibrated threshold. Any γ can be asked
  for.{predictor}
- `topk` (**not causal**): the training rule, the best-scored share of the whole text. For training and comparisons
  only; figures measured with it are marked."""


def _training(facts: ModelFacts) -> str:
    settings = facts.settings
    if not settings:
        return ""
    training, data = settings.get("training", {}), settings.get("data", {})
    metrics = facts.evaluation
    rows = [("start", _base(facts))]
    if "step" in metrics:
        rows.append(("updates", f"{metrics['step']:,}, {metrics.get('tokens', 0):,} tokens"))
    rows += [
        ("sequence length", str(data.get("seq_len", ""))),
        ("tokens per update", f"{training['tokens_per_update']:,}" if training.get("tokens_per_update") else ""),
        ("peak learning rates", ", ".join(f"{k} {v:g}" for k, v in training.get("learning_rates", {}).items())),
        ("schedule", f"{training.get('schedule', '')}, warm-up {training.get('warmup_ratio', 0):g}"),
        ("weight decay", f"{training.get('weight_decay', 0):g}"),
        ("seed", str(settings.get("run", {}).get("seed", ""))),
    ]
    mixture = [
        [f"[{name}](https://huggingface.co/datasets/{name})" if hub else name, configuration or "–", f"{share:g}"]
        for name, configuration, share, hub in facts.datasets
    ]
    parts = ["## Training", _table(["", ""], [row for row in rows if row[1]])]
    if mixture:
        parts.append(_table(["data", "configuration", "share of documents"], mixture))
    if facts.has_curves:
        parts.append(f"![Losses, routed shares and speed over the run]({CURVES_FILE})")
    parts.append(
        f"<details><summary>All settings</summary>\n\n```toml\n{tomlkit.dumps(settings).strip()}\n```\n\n</details>"
    )
    return "\n\n".join(parts)


def _evaluation(facts: ModelFacts) -> str:
    parts = []
    metrics = facts.evaluation
    rows = []
    for name, key, remark in (
        ("loss", "val/loss", "nats per token; causal" if facts.routed_layers else "nats per token"),
        ("loss with top-k", "val/loss_topk", "**not causal**"),
        ("bits per byte", "val/bits_per_byte", ""),
    ):
        if metrics.get(key) is not None:
            rows.append([name, f"{metrics[key]:.4f}", remark])
    if rows and facts.unigram is not None:
        rows.append(["loss of token counts alone", f"{facts.unigram:.4f}", "what a model has to beat"])
    shares = [value for key, value in metrics.items() if re.fullmatch(r"router/\d+/routed_share", key) and value]
    if shares:
        spread = f"{min(shares):.3f} to {max(shares):.3f} by layer"
        rows.append(["routed share", f"{sum(shares) / len(shares):.3f}", spread])
    if rows:
        parts += ["On held-out text of the training data:", _table(["", "", ""], rows)]
    if facts.results is not None:
        parts += [_how_measured(facts.results), _scores(facts.results)]
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _how_measured(results: EvalResults) -> str:
    how = []
    if results.routing:
        causal = "causal" if results.causal else "**not causal: a token's path depends on the tokens after it**"
        how.append(f"routing `{results.routing}` ({causal})")
    if isinstance(results.capacity, (int, float)):
        how.append(f"γ = {results.capacity:g}")
    if results.routed_share is not None:
        how.append(f"{results.routed_share:.3f} of the tokens really routed")
    if results.seed is not None:
        how.append(f"seed {results.seed}")
    how += [f"{name} {version}" for name, version in results.versions.items() if name in ("lm_eval", "lm-eval")]
    return f"Benchmarks: {'; '.join(how)}." if how else "Benchmarks:"


def _scores(results: EvalResults) -> str:
    mark = "" if results.causal else " (not causal)"
    rows = []
    for result in results.tasks:
        shots = "–" if result.shots is None else str(result.shots)
        if result.fewshot_source and result.shots:
            shots += f" ({result.fewshot_source})"
        for score in result.scores:
            error = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
            share = f"{result.routed_share:.3f}" if result.routed_share is not None else "–"
            n = "–" if result.n is None else f"{result.n:,}"
            if result.n_total is not None and result.n_total != result.n:
                n += f" of {result.n_total:,}"
            rows.append([result.task, score.metric + mark, f"{score.value:.4f}{error}", n, shots, share])
    return _table(["task", "metric", "value", "n", "shots", "routed share"], rows)


def _limits(facts: ModelFacts) -> str:
    lines = []
    if facts.routed_layers:
        lines += [
            "γ is a wish: the share of tokens that is really routed follows from calibrated thresholds and depends on "
            "the kind of text and on the position. Measure it on yours.",
            "`topk` looks at the whole text. Losses and scores measured with it cannot be reached while generating.",
        ]
        if "auto_map" in facts.config:
            lines.append(
                "Loading it runs the Python files of this repository (`trust_remote_code=True`): read them, or use dtf."
            )
        tokens = facts.settings.get("training", {}).get("calibration_tokens")
        if tokens:
            length = facts.settings.get("data", {}).get("seq_len")
            lines.append(f"Thresholds were calibrated on {tokens:,} tokens of training text, {length} at a time.")
    seen = facts.evaluation.get("tokens")
    if facts.base == "" and seen and seen < _FEW_TOKENS:
        lines.append(f"It has seen {seen:,} tokens in its life: enough to study routing, not to know things.")
    if facts.results is None:
        lines.append("No benchmark was run on these weights.")
    lines.append("Neither safety nor following instructions was measured; it repeats the biases of its data.")
    if not facts.base_on_hub or base_license(facts.base) is None:
        lines.append("No license is stated here: ask the owner of the repository before using it.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _citation(facts: ModelFacts) -> str:
    wanted = {"dtf": ["dtf", "mod"], "mod": ["mod"]}.get(facts.architecture, [])
    if not wanted:
        return ""
    entries = "\n\n".join(_CITATIONS[name] for name in wanted)
    return f"## Citation\n\n```bibtex\n{entries}\n```"


def _table(columns: list[str], rows: list[Any]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _count(number: int) -> str:
    if number < 1000:
        return str(number)
    power = min(3, int(math.log10(number) // 3))
    return f"{number / 1000**power:.1f}{' KMB'[power]}"
