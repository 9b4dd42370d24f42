"""`dtf inspect-routing`: what it prints and leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import Outcome
from tests.inspection.conftest import FIELDS, TEXT, model_by


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Path:
    """A routed model by each kind of score."""
    root = tmp_path_factory.mktemp("models")
    for score in FIELDS:
        model_by(score).save_pretrained(root / score)
        words.save_pretrained(root / score)
    return root


SURPRISE = ("D_st", "D_ch", "S_CE", "S_CU", "by CE", "static_surprise", "ce_part", "driven")
"""Words of the thesis's score."""


def test_terminal(dtf: Callable[..., Outcome], folder: Path) -> None:
    result = dtf("inspect-routing", str(folder / "forecast_error"), TEXT, "--against-oracle")
    assert result.code == 0, result.stderr
    for expected in ("DTF by forecast_error", "threshold (causal)", "layer 5", "most routed", "least routed"):
        assert expected in result.stdout
    for expected in ("Jaccard", "took the forecast", "predicted error", "Forecast misses", "missed: routed"):
        assert expected in result.stdout
    assert "\x1b" not in result.stdout
    mod = dtf("inspect-routing", str(folder / "mod"), TEXT, "--routing", "topk")
    assert "NOT causal" in mod.stdout
    assert "forecast" not in mod.stdout
    surprise = dtf("inspect-routing", str(folder / "surprise"), TEXT)
    assert "DTF by surprise" in surprise.stdout
    for word in SURPRISE[:5]:
        assert word in surprise.stdout
        assert word not in result.stdout + mod.stdout


def test_a_long_text_is_cut_on_the_terminal_alone(dtf: Callable[..., Outcome], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join([TEXT] * 50))
    out = tmp_path / "out.json"
    result = dtf(
        "inspect-routing", str(folder / "forecast_error"), "--file", str(tmp_path / "long.txt"), "--output", str(out)
    )
    assert "windows" in result.stderr
    assert "more tokens" in result.stdout
    assert len(result.stdout) < 30_000
    report = json.loads(out.read_text())
    assert len(report["tokens"]) == len(report["depth"]) == len(report["layers"][0]["selected"]) > 1000


def test_json_and_files(dtf: Callable[..., Outcome], folder: Path, tmp_path: Path) -> None:
    names = {"--html": "page.html", "--png": "figure.png", "--output": "all.json"}
    targets = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    result = dtf("inspect-routing", str(folder / "forecast_error"), TEXT, "--json", *targets)
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "all.json").read_text())
    assert document["loss"][0] is None
    assert document["agreement"]["second"] == "topk"
    assert (document["score"], document["bypass"]) == ("forecast_error", "forecast")
    assert len(document["layers"][0]["predicted_cost"]) == len(document["tokens"])
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "predicted error" in page
    assert not any(word in page + result.stdout for word in SURPRISE)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_corpus(dtf: Callable[..., Outcome], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in (TEXT, "a b c", "d e f " * 300)))
    arguments = ["inspect-routing", str(folder / "forecast_error"), "--file", str(file), "--text-field", "body"]
    result = dtf(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["summary"]["texts"] == 3
    assert document["cut_documents"] == 1
    assert "windows" in result.stderr
    assert "tokens" not in document
    against = dtf(*arguments, "--against-oracle", "--json")
    oracle = json.loads(against.stdout)["oracle"]
    assert oracle["texts"] == 3
    assert oracle["loss"]["router"] == pytest.approx(document["summary"]["loss"], rel=1e-5)
    assert len(oracle["difference"]["oracle"]) == 2
    limited = dtf(*arguments, "--limit", "2")
    assert "2 documents" in limited.stdout
