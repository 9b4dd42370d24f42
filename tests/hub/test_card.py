"""The model card: what it says, and metadata that the Hub takes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard

from dtfcli.errors import ConfigError
from dtfcli.evaluation.report import EvalReport
from dtfcli.hub.card import model_card
from dtfcli.hub.facts import LocalModel, ModelFacts, gather_facts
from dtfcli.hub.upload import PushOptions, prepare_upload
from dtfcli.loading.model_files import weights_hash
from dtfcli.runs.public import public_name
from tests.hub.standin import card_errors

CONFIG = {
    "architecture": "dtf",
    "auto_map": {"AutoConfig": "configuration_dynamic.DynamicLlamaConfig"},
    "capacity": 0.5,
    "gate": "straight_through",
    "kv_tokens": "routed",
    "model_type": "dynamic_llama",
    "num_hidden_layers": 4,
    "routing": "threshold",
    "sink_tokens": 1,
}
SETTINGS = {
    "run": {"name": "x", "seed": 7},
    "model": {"architecture": "dtf", "base": "Qwen/Qwen2.5-0.5B"},
    "data": {"seq_len": 64, "sources": [{"path": "roneneldan/TinyStories"}]},
    "training": {"learning_rates": {"base": 1e-5}, "schedule": "cosine", "warmup_ratio": 0.01, "weight_decay": 0.01},
}
OWN: dict[str, Any] = {
    "model": "/home/jane/outputs/x",
    "model_hash": "sha256:" + "a" * 64,
    "routing": "threshold",
    "causal": True,
    "capacity": 0.5,
    "seed": 1234,
    "versions": {"lm_eval": "0.4.13"},
    "routed_share": {"overall": 0.48, "by_layer": {"1": 0.48}},
    "results": {
        "arc_easy": {
            "metrics": {"acc": {"value": 0.31, "stderr": 0.02}, "acc_norm": {"value": float("nan"), "stderr": None}},
            "n": 20,
            "n_total": 2376,
            "shots": 3,
            "fewshot_from": "train",
            "dataset": "allenai/ai2_arc (ARC-Easy)",
            "split": "test",
            "routed_share": {"overall": 0.47},
        },
        "my_task": {"metrics": {"exact_match,strict": {"value": 0.5, "stderr": None}}},
        "empty_group": {"metrics": {}},
    },
}
STOCK: dict[str, Any] = {
    "results": {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.26},
        "group": {"alias": "group"},
    },
    "n-shot": {"hellaswag": 10},
    "n-samples": {"hellaswag": {"original": 10042, "effective": 100}},
    "configs": {"hellaswag": {"dataset_path": "Rowan/hellaswag", "dataset_name": None}},
    "versions": {"hellaswag": 1.0},
    "config": {"model": "hf", "model_args": "pretrained=/home/jane/m,trust_remote_code=True"},
    "lm_eval_version": "0.4.13",
}


def _facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "repo": "me/new",
        "config": CONFIG,
        "parameters": 1_234_567,
        "added_parameters": 890,
        "weights_sha256": {"model.safetensors": "f" * 64},
        "routed_layers": [1, 3],
        "base": "Qwen/Qwen2.5-0.5B",
        "base_on_hub": True,
        "datasets": [("roneneldan/TinyStories", "", 1.0, True), ("local text (.jsonl)", "", 0.5, False)],
        "settings": SETTINGS,
        "version": "0.2.0",
    }
    return ModelFacts(**values | changes)


def _results(document: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    return EvalReport.read(path)


def _metadata(card: ModelCard) -> dict[str, Any]:
    return yaml.safe_load(str(card).split("---")[1])


def test_metadata() -> None:
    data = _metadata(model_card(_facts()))
    assert data == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "finetune",
        "datasets": ["roneneldan/TinyStories"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["dtf", "dynamic-transformer", "mixture-of-depths", "conditional-computation", "custom_code"],
    }


def test_nothing_is_claimed_that_is_not_known() -> None:
    data = _metadata(model_card(_facts(base="", base_on_hub=False, datasets=[], settings={})))
    assert not {"license", "base_model", "datasets", "model-index", "language"} & set(data)
    card = str(model_card(_facts(base="somebody/unknown-base")))
    assert "license:" not in card
    assert "No license is stated" in card


def test_a_converted_chat_model_is_shown_chatting_and_its_dial_is_turned_on() -> None:
    points = [
        {"saving": saving, "capacity": capacity, "loss_gap": saving, "stderr": 0.01, "tokens": 1024}
        | dict.fromkeys(("agreement", "kl", "routed_share"), 0.5)
        for saving, capacity in ((0.1, 0.762), (0.2, 0.523))
    ]
    conversion = {"model": "a/chat", "dial": points, "chosen": points[0], "before": None, "text": {"fit_tokens": 9}}
    facts = _facts(config=CONFIG | {"routed_part": "mlp"}, settings={}, conversion=conversion, chats=True)
    card = model_card(facts)
    assert "mixture-of-depths" not in _metadata(card)["tags"]
    assert "apply_chat_template" in str(card)
    assert "--chat" in str(card)
    assert "capacity=0.52)" in str(card)


def test_the_dial_is_turned_down_or_not_at_all() -> None:
    for config, capacity in (
        (CONFIG, 0.25),
        (CONFIG | {"capacity": [0.5, 0.2]}, None),
        (CONFIG | {"capacity": 0.2}, None),
    ):
        card = str(model_card(_facts(config=config)))
        assert (f"capacity={capacity})" in card) == ("set_routing(" in card) == (capacity is not None)


def test_a_model_converted_from_the_hub_names_its_base(tmp_path: Path) -> None:
    for name, base in (("owner/model", "owner/model"), ("model", None), ("/home/jane/model", None)):
        report = {"model": name, "dial": [], "chosen": {}, "text": {}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        facts = gather_facts(LocalModel(tmp_path, tmp_path, None, None, {}, []), "me/new", None, None, False)
        assert (facts.base if facts.base_on_hub else None) == base
        assert facts.base == (base or "model")


def test_a_dense_model_has_no_routing_section() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4}
    card = str(model_card(_facts(config=config, routed_layers=[])))
    assert not [word for word in ("## How it routes", "trust_remote_code", "topk", "## Citation") if word in card]


def test_sections_of_a_routed_model() -> None:
    evaluation = {"step": 6, "tokens": 768, "val/loss": 2.5, "val/loss_topk": 2.4, "router/1/routed_share": 0.4}
    card = str(model_card(_facts(evaluation=evaluation, unigram=3.0, has_curves=True)))
    for text in (
        "| loss | 2.5000 | nats per token; causal |",
        "| loss with top-k | 2.4000 | **not causal** |",
        "| loss of token counts alone | 3.0000 |",
        "| capacity γ | 0.5 |",
        "of which route: 1, 3",
        "](curves.png)",
        "@mastersthesis",
        "| local text (.jsonl) | – | 0.5 |",
        "## Limits",
        "base = 1e-05",
    ):
        assert text in card, text


def test_results_of_dtf_eval(tmp_path: Path) -> None:
    card = model_card(_facts(results=_results(OWN, tmp_path)))
    assert "| arc_easy | acc | 0.3100 ± 0.0200 | 20 of 2,376 | 3 (train) | 0.470 |" in str(card)
    assert "routing `threshold` (causal); γ = 0.5; 0.480 of the tokens routed; seed 1234" in str(card)
    assert "jane" not in str(card)
    assert "nan" not in str(card).lower().replace("nanochat", "")
    index = _metadata(card)["model-index"]
    assert index[0]["name"] == "new"
    first, second = index[0]["results"]
    assert first["dataset"]["type"] == "allenai/ai2_arc"
    assert (first["dataset"]["config"], first["dataset"]["split"]) == ("ARC-Easy", "test")
    assert first["metrics"] == [{"type": "acc", "value": 0.31, "name": "acc, 3-shot, 20 of 2376 items"}]
    assert second["dataset"]["type"] == "my_task"
    assert second["metrics"][0]["name"] == "exact_match (strict)"
    assert card_errors(str(card)) == []


def test_results_of_lm_eval(tmp_path: Path) -> None:
    results = _results(STOCK, tmp_path)
    assert results.model_hash is None
    card = model_card(_facts(results=results))
    assert "| hellaswag | acc | 0.2500 ± 0.0100 | 100 of 10,042 | 10 | – |" in str(card)
    assert _metadata(card)["model-index"][0]["results"][0]["dataset"]["type"] == "Rowan/hellaswag"
    assert "jane" not in str(card)
    assert card_errors(str(card)) == []


def test_what_a_file_does_not_know_is_left_out(tmp_path: Path) -> None:
    unknown = {"routing": None, "device": None, "versions": {"torch": None}, "routed_share": 0.5, "model_hash": ""}
    results = _results(OWN | unknown, tmp_path)
    assert results.results
    assert card_errors(str(model_card(_facts(results=results)))) == []
    counts = {"n-samples": {"mmlu": {"original": None, "effective": None}}}
    results = _results({"results": {"mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01}}, **counts}, tmp_path)
    (entry,) = _metadata(model_card(_facts(results=results)))["model-index"][0]["results"]
    assert (entry["dataset"]["type"], entry["dataset"]["config"]) == ("cais/mmlu", "all"), "of a group, lm-eval's own"


@pytest.mark.parametrize("changes", [{"routing": "topk"}, {"causal": False}])
def test_results_that_are_not_causal_say_so_everywhere(changes: dict[str, Any], tmp_path: Path) -> None:
    card = model_card(_facts(results=_results(OWN | changes, tmp_path)))
    assert "acc (not causal) | 0.3100" in str(card)
    assert "**not causal: a token's path depends on the tokens after it**" in str(card)
    for result in _metadata(card)["model-index"][0]["results"]:
        for metric in result["metrics"]:
            assert "not causal" in metric["name"]
            assert "not causal" in metric["config"]


def test_how_results_were_measured_is_named(tmp_path: Path) -> None:
    arguments = {"model_args": "pretrained=x,routing=topk,trust_remote_code=True"}
    assert not _results(STOCK | {"config": arguments}, tmp_path).causal
    card = model_card(_facts(results=_results(OWN | {"capacity": 0.25}, tmp_path)))
    assert "γ = 0.25" in _metadata(card)["model-index"][0]["results"][0]["metrics"][0]["name"]
    config = CONFIG | {"predictor_loss_weight": 0.01, "routing": "predictor"}
    text = str(model_card(_facts(results=_results(OWN | {"routing": "predictor"}, tmp_path), config=config)))
    assert "routing `predictor` (causal)" in text
    assert "- `predictor` (causal)" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", ["holds no JSON object", "dtf eval"]),
        ('{"result": {}}', ['no "results"']),
        ('{"results": {"a": {"alias": "a"}}}', ["hold no figure"]),
        ('{"results": {"a": {"metrics": {"acc": {"value": 1}}, "n": "all"}}}', ["results.a.n", "dtf eval"]),
    ],
)
def test_what_is_no_evaluation(content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        EvalReport.read(tmp_path / "results.json")
    assert all(word in str(caught.value) for word in ["results.json: ", *words])


def test_results_beside_the_model_are_shown_if_they_are_its_own_and_causal_ones_first(
    model: Path, tmp_path: Path
) -> None:
    def write(name: str, **changes: Any) -> None:
        (model / "eval" / f"{name}.json").write_text(json.dumps(OWN | changes))

    def pushed(**options: Any) -> tuple[str, list[str]]:
        upload = prepare_upload(model, "me/new", PushOptions(**options))
        return bytes(upload.files["README.md"]).decode(), upload.warnings

    digest = weights_hash(model)
    (model / "eval").mkdir()
    write("latest")
    card, (warning,) = pushed()
    assert "no results of these weights" in warning
    assert "arc_easy" not in card
    write("later", model_hash=digest, routing="topk", causal=False)
    card, warnings = pushed()
    assert warnings == []
    assert "acc (not causal)" in card
    write("earlier", model_hash=digest)
    os.utime(model / "eval" / "earlier.json", (1, 1))
    assert "arc_easy | acc |" in pushed()[0]
    with pytest.raises(ConfigError, match=r"measured other weights .*dtf eval"):
        pushed(eval_results=model / "eval" / "latest.json")
    (tmp_path / "stock.json").write_text(json.dumps(STOCK))
    assert "does not name the weights" in pushed(eval_results=tmp_path / "stock.json")[1][0]


@pytest.mark.parametrize(
    ("text", "name", "on_hub"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", True),
        ("/home/jane/corpus.jsonl", "local text (.jsonl)", False),
        ("data/my_corpus.jsonl", "local text (.jsonl)", False),
        ("~/novels", "a local folder", False),
        ("novels", "a local folder", False),
        ("here/novels", "a local folder", False),
        ("beside/novels", "a local folder", False),
        ("gone/my--novels", "a local folder", False),  # no valid id, so never in the metadata
        ("models/Small-Q4.gguf", "Small-Q4.gguf (a local file)", False),
        (r"C:\Users\jane\novels", "a local folder", False),
        ("python-stdlib", "Python standard library", False),
        ("", "", False),
    ],
)
def test_local_places_are_called_by_their_kind(
    text: str, name: str, on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd" / "here" / "novels").mkdir(parents=True)
    (tmp_path / "project" / "beside" / "novels").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    assert public_name(text, tmp_path / "project" / "outputs" / "day" / "run") == (name, on_hub)


@pytest.mark.parametrize(("architecture", "words"), [("random", "fixed random linear score"), ("layerdrop", "is kept")])
def test_a_control_says_what_it_is(architecture: str, words: str) -> None:
    text = str(model_card(_facts(config=CONFIG | {"architecture": architecture})))
    assert words in text
    assert ("process only some of the tokens" in text) == (architecture == "random")
    assert ("not causal" in text) == (architecture == "random")
    assert card_errors(text) == []


PREDICTED = {"bypass": "forecast", "routed_part": "mlp"}


@pytest.mark.parametrize(
    ("fields", "words", "absent"),
    [
        (
            {"score": "forecast_error", **PREDICTED},
            [
                "cheap forecast of its update would be far off",
                "take that forecast. Attention and its cache are those of the dense model.",
                "| routed part | mlp |",
                "| score | `forecast_error` |",
            ],
            ["| gate |", "| keys and values of |", "surprise"],  # which such a model does not read
        ),
        ({"score": "update_size"}, ["its update is large"], ["surprise"]),
        ({"score": "surprise"}, ["the token surprised the decision layer below it"], ["forecast"]),
    ],
)
def test_it_says_how_tokens_are_chosen_and_what_the_others_take(
    fields: dict[str, Any], words: list[str], absent: list[str]
) -> None:
    card = str(model_card(_facts(config=CONFIG | fields)))
    assert [word for word in words if word not in card] == []
    assert [word for word in absent if word in card] == []
