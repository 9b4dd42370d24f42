"""Scores of a quantized model are told from those of the plain one: in the document, when resumed, when pushed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import dtfcli
from dtfcli.errors import ConfigError
from dtfcli.evaluation.answers import AnswerStore
from dtfcli.hub.upload import PushOptions, prepare_upload
from tests.conftest import Outcome

pytest.importorskip("torchao")


def test_told_apart(
    model: Path,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: Path,
    task_dir: Path,
    dtf: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = {"data_dir": data_dir, "include_path": task_dir, "limit": 4, "batch_size": 2}
    options = [part for name, value in toy.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["eval", str(model), "--tasks", "toy_choice", *options, "--device", "cpu", "--json"]

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "discard", AnswerStore.close)  # as if it was killed before its end
        plain = json.loads(dtf(*command).stdout)
        assert json.loads(dtf(*command).stdout)["reused"] == 16
    assert plain["quantize"] is None
    for file in (model / "eval").glob("*.json"):
        file.unlink()
    result = dtf(*command, "--quantize", "int8")
    assert result.code == 0, result
    assert "quantized int8: " in result.stderr
    document = json.loads(result.stdout)
    assert document["reused"] == 0
    assert document["quantize"] == document["quantization"]["kind"] == "int8"
    assert document["quantization"]["loss_after"] is not None
    assert document["model_hash"] == plain["model_hash"]  # of the files, which are the same

    latest = model / "eval" / "latest.json"
    assert json.loads(latest.read_text())["quantize"] == "int8"
    assert "toy_choice" not in bytes(prepare_upload(model, "me/new").files["README.md"]).decode()
    with pytest.raises(ConfigError, match=r"weights in int8, and plain ones are pushed.*without --quantize"):
        prepare_upload(model, "me/new", PushOptions(eval_results=latest))

    loaded = dtfcli.load_model(model, device="cpu", quantize="int8")
    report = dtfcli.evaluate(loaded, "toy_choice", tokenizer=tokenizer, **toy)
    assert report.quantize == "int8"
    assert report.model_hash != document["model_hash"]  # of the tensors
    scores = {name: metric.value for name, metric in report.results["toy_choice"].metrics.items()}
    metrics = document["results"]["toy_choice"]["metrics"]
    assert scores == {name: metric["value"] for name, metric in metrics.items()}
