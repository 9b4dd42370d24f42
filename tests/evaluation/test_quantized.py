"""Scores of a quantized model are told from those of the plain one: in the document, when resumed, when pushed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import dtfcli
from dtfcli.errors import ConfigError
from dtfcli.hub.upload import prepare_upload
from tests.conftest import Outcome
from tests.tiny import routed_model

pytest.importorskip("torchao")


def test_told_apart(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data_dir: Path, task_dir: Path, dtf: Callable[..., Outcome]
) -> None:
    model = tmp_path / "model"
    routed_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    toy = {"data_dir": data_dir, "include_path": task_dir, "limit": 4, "batch_size": 2}
    options = [part for name, value in toy.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["eval", str(model), "--tasks", "toy_choice", *options, "--device", "cpu", "--json"]

    # An evaluation of the plain model that was stopped: its answers are not those of the quantized one.
    plain = json.loads(dtf(*command, "--output", str(tmp_path / "plain.json")).stdout)
    assert plain["quantize"] is None
    result = dtf(*command, "--quantize", "int8")
    assert result.code == 0, result
    assert "quantized int8: " in result.stderr
    found = json.loads(result.stdout)
    assert found["quantize"] == found["quantization"]["kind"] == "int8"
    assert found["quantization"]["loss_after"] is not None
    assert found["model_hash"] == plain["model_hash"]  # of the files, which are the same

    latest = model / "eval" / "latest.json"
    assert json.loads(latest.read_text())["quantize"] == "int8"
    assert "toy_choice" not in bytes(prepare_upload(model, "me/new").files["README.md"]).decode()
    with pytest.raises(ConfigError, match=r"weights in int8, and plain ones are pushed.*without --quantize"):
        prepare_upload(model, "me/new", eval_results=latest)

    report = dtfcli.evaluate(
        dtfcli.load_model(model, device="cpu", quantize="int8"), "toy_choice", tokenizer=tokenizer, **toy
    )
    assert report.quantize == "int8"
    assert report.model_hash != found["model_hash"]  # of the tensors
    scores = {name: metric.value for name, metric in report.results["toy_choice"].metrics.items()}
    assert scores == {name: metric["value"] for name, metric in found["results"]["toy_choice"]["metrics"].items()}


def test_answers_are_kept_apart(tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import Any

    from dtfcli.evaluation.job_runner import JobRunner
    from dtfcli.evaluation.plan import make_plan
    from dtfcli.loading.quantization import quantize

    names = []
    for kind in (None, "int8"):
        model: Any = routed_model()
        if kind is not None:
            quantize(model, kind)
        lm: Any = SimpleNamespace(model=model, meter=None, routing="threshold", device=model.device, max_length=512)
        runner = JobRunner(make_plan("arc_easy"), lm, None, tmp_path, lambda event: None)
        runner.hash = "the same files"
        job: Any = SimpleNamespace(job=SimpleNamespace(name="toy", limit=None), configuration=dict)
        names.append(runner._state_file(job))
    assert names[0] != names[1]
