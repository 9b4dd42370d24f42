"""Writes the model card (README.md) of a pushed model from the facts about it.

The card reports measurements with their conditions, and leaves out what is not known. It states a license only if the
base has one, and names a data set only if it is on the Hub.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import tomlkit
from huggingface_hub import ModelCard

from dtfcli.evaluation.report import EvalReport
from dtfcli.hub.facts import ModelFacts
from dtfcli.hub.metadata import card_metadata, check_metadata, shown_metric
from dtfcli.loading.base_configs import base_license
from dtfcli.models.configuration_fields import RoutingFields, unread_fields
from dtfcli.runs.folder import CURVES_FILE

_FEW_TOKENS = 1_000_000_000

_LONG_NAMES = {
    "dtf": "Dynamic Transformer (DTF)",
    "mod": "Mixture-of-Depths (MoD)",
    "random": "Mixture-of-Depths with a random router",
    "layerdrop": "transformer with layers left out",
}
_HOW = {
    "dtf": "A routed layer processes a token if the token surprised the decision layer below it: that layer's output "
    "differs from its input more than a small prior network expected, or more than for the tokens before. The others",
    "mod": "A routed layer processes a token if its linear router gives the token a high score. The others",
    "random": "A control: a routed layer processes a token if a fixed random linear score of it is high. The others",
    "layerdrop": "A control: of the routed layers, a share γ processes all tokens, the rest none. Left-out tokens",
}
_COSTS = {
    "update_size": "A routed layer processes a token if a learned estimate, made from the token alone, says that its "
    "update is large. The others",
    "forecast_error": "A routed layer processes a token if a learned estimate, made from the token alone, says that a "
    "cheap forecast of its update would be far off. The others",
}
"""By `score`, in place of surprise."""
_PARTS = {"mlp": "MLP", "attention": "attention"}
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


def model_card(facts: ModelFacts) -> ModelCard:
    """The card, metadata first.

    Raises:
        ValueError: the metadata would not be valid.
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
    data = card_metadata(facts)
    text = "\n\n".join(part.strip() for part in body if part)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    check_metadata(card, data)
    return card


def _overall(share: dict[str, Any] | None) -> float | None:
    """The routed share over all layers, if it was measured."""
    value = share.get("overall") if share is not None else None
    return value if isinstance(value, float) else None


def _summary(facts: ModelFacts) -> str:
    size = f"{_count(facts.parameters)} parameters"
    if facts.is_adapter:
        kind = f"make it a **{_LONG_NAMES[facts.architecture]}**" if facts.routed_layers else "adapt it"
        routed = f" {_routed(facts)}" if facts.routed_layers else ""
        return f"LoRA adapters of {size} for {_base(facts)} that {kind}.{routed} Trained with dtf {facts.version}."
    if not facts.routed_layers:
        made = f"trained from {_base(facts)}" if facts.base is not None else "saved"
        return f"A dense language model of {size}, {made} with dtf {facts.version}: a baseline for routed models."
    long_name = _LONG_NAMES[facts.architecture]
    made = f"trained from {_base(facts)}" if facts.base is not None else "saved"
    return f"A **{long_name}** of {size}. {_routed(facts)} The model was {made} with dtf {facts.version}."


def _routed(facts: ModelFacts) -> str:
    layers = f"{len(facts.routed_layers)} of {facts.config['num_hidden_layers']} layers"
    if facts.architecture == "layerdrop":
        return f"Of {layers}, {_capacity(facts)} is kept; the rest is left out."
    return f"{layers} process only some of the tokens, {_capacity(facts)}."


def _base(facts: ModelFacts) -> str:
    if not facts.base:
        return "random weights"
    if facts.base_on_hub:
        return f"[{facts.base}](https://huggingface.co/{facts.base})"
    return facts.base


def _capacity(facts: ModelFacts) -> str:
    capacity = facts.config.get("capacity", RoutingFields.capacity)
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
        less = "keep fewer layers" if facts.architecture == "layerdrop" else "route fewer tokens"
        lines += ["", f'model.set_routing("threshold", capacity=0.25)  # {less}, without retraining']
    at = f"@{facts.revision}" if facts.revision else ""
    command = f'dtf generate {facts.repo}{at} "Once upon a time"'
    code = "\n".join(lines)
    remark = ""
    if trust:
        library = facts.config.get("transformers_version", "")
        remark = (
            "This repository holds the model's code, so `dtf` is not needed"
            f"{f' (saved with Transformers {library})' if library else ''}. "
        )
    elif routed_adapter:
        remark = (
            f"`dtf` loads {_base(facts)} and adds the routing and the adapters. Transformers and peft alone would load "
            "the base without its routing. "
        )
    return f"## Use\n\n```python\n{code}\n```\n\n{remark}With `dtf`:\n\n```\n{command}\n```"


def _how_it_routes(facts: ModelFacts) -> str:
    if not facts.routed_layers:
        return ""
    config = facts.config
    rows = [
        ("architecture", f"{facts.architecture}, `{config.get('model_type', '')}`"),
        ("layers", f"{config['num_hidden_layers']}, of which route: {', '.join(map(str, facts.routed_layers))}"),
        ("capacity γ", _capacity(facts).removeprefix("a share of γ = ")),
        ("routing mode", f"`{config.get('routing', 'threshold')}`"),
        *_options(config, facts.architecture),
        (
            "parameters" + (" here" if facts.is_adapter else ""),
            f"{facts.parameters:,}, of which {facts.added_parameters:,} belong to the routing",
        ),
        *((f"sha256 of {name}", f"`{digest}`") for name, digest in facts.weights_sha256.items()),
    ]
    every_key = config.get("kv_tokens") != "routed" or config.get("routed_part") == "mlp"
    stored = "store only keys and values" if every_key else "store no keys and values there"
    part = config.get("routed_part", "block")
    passing = "pass through unchanged" if part == "block" else f"skip its {_PARTS[part]}"
    passing = "take a forecast of the update" if config.get("bypass") == "forecast" else passing
    how = _COSTS.get(str(config.get("score"))) if facts.architecture == "dtf" else None
    predictor = (
        "\n- `predictor` (causal): a small network predicts the training rule's choice from the layer's input."
        if config.get("predictor_loss_weight")
        else ""
    )
    if facts.architecture == "layerdrop":
        modes = "Nothing depends on a token: every routing mode is causal and does the same."
    else:
        modes = f"""- `threshold` (causal): a token is routed if its score exceeds the layer's calibrated threshold,
  for any γ.{predictor}
- `topk` (**not causal**): the training rule routes the tokens with the highest scores in the whole text. It is for
  training and comparisons only, and its figures are marked."""
    return f"""## How it routes

{how or _HOW[facts.architecture]} {passing} and {stored}.

{_table(["", ""], rows)}

{modes}"""


def _options(config: Mapping[str, Any], architecture: str) -> list[tuple[str, str]]:
    """Rows about how tokens are routed, of the fields that such a model reads."""
    unread = unread_fields({**config, "architecture": architecture})
    names = {
        "routed_part": ("routed part", "{}"),
        "score": ("score", "`{}`"),
        "gate": ("gate", "`{}`"),
        "bypass": ("tokens that skip take", "{}"),
        "budget": ("γ is the share of each", "{}"),
        "sink_tokens": ("sink tokens", "{}"),
        "kv_tokens": ("keys and values of", "{} tokens"),
    }
    return [
        (shown, form.format(config[name]))
        for name, (shown, form) in names.items()
        if name not in unread and name in config
    ]


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
        rows.append(["loss of token counts alone", f"{facts.unigram:.4f}", "a model must be below it"])
    shares = [value for key, value in metrics.items() if re.fullmatch(r"router/\d+/routed_share", key) and value]
    if shares:
        spread = f"{min(shares):.3f} to {max(shares):.3f} by layer"
        rows.append(["routed share", f"{sum(shares) / len(shares):.3f}", spread])
    if rows:
        parts += ["On held-out text of the training data:", _table(["", "", ""], rows)]
    if facts.results is not None:
        parts += [_how_measured(facts.results), _scores(facts.results)]
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _how_measured(report: EvalReport) -> str:
    how = []
    if report.routing not in ("", "dense"):
        causal = "causal" if report.causal else "**not causal: a token's path depends on the tokens after it**"
        how.append(f"routing `{report.routing}` ({causal})")
    if isinstance(report.capacity, float):
        how.append(f"γ = {report.capacity:g}")
    if (share := _overall(report.routed_share)) is not None:
        how.append(f"{share:.3f} of the tokens routed")
    if report.seed is not None:
        how.append(f"seed {report.seed}")
    how += [f"{name} {version}" for name, version in report.versions.items() if name == "lm_eval"]
    return f"Benchmarks: {'; '.join(how)}." if how else "Benchmarks:"


def _scores(report: EvalReport) -> str:
    mark = "" if report.causal else " (not causal)"
    rows = []
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
            rows.append([task, shown_metric(name) + mark, value, n, shots, "–" if share is None else f"{share:.3f}"])
    return _table(["task", "metric", "value", "n", "shots", "routed share"], rows)


def _limits(facts: ModelFacts) -> str:
    lines = []
    if facts.routed_layers:
        lines += [
            "γ is a target: the share of routed tokens follows from calibrated thresholds, and depends on the kind of "
            "text and on the position. Measure it on your text.",
            "`topk` sees the whole text. Generation cannot reach the losses and scores measured with it.",
        ]
        if "auto_map" in facts.config:
            lines.append(
                "Loading it runs the Python files of this repository (`trust_remote_code=True`). Read them, or use dtf."
            )
        tokens = facts.settings.get("training", {}).get("calibration_tokens")
        if tokens:
            length = facts.settings.get("data", {}).get("seq_len")
            lines.append(f"Thresholds were calibrated on {tokens:,} tokens of training text, in sequences of {length}.")
    seen = facts.evaluation.get("tokens")
    if facts.base == "" and seen and seen < _FEW_TOKENS:
        lines.append(f"The model was trained on {seen:,} tokens: enough to study routing, too few for knowledge.")
    if facts.results is None:
        lines.append("No benchmark was run on these weights.")
    lines.append("Safety and instruction following were not measured. The model repeats the biases of its data.")
    if not facts.base_on_hub or base_license(facts.base) is None:
        lines.append("No license is stated here. Ask the owner of the repository before you use the model.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _citation(facts: ModelFacts) -> str:
    wanted = {"dtf": ["dtf", "mod"], "mod": ["mod"], "random": ["mod"]}.get(facts.architecture, [])
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
