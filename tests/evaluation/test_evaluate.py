"""Scores are those of lm-eval, do not depend on the batch in any routing mode, and come with what they depend on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

import dtfcli
from dtfcli.errors import ConfigError, DataError
from dtfcli.evaluation.harness import load_job
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.report import EvalReport, Metric, write_document
from dtfcli.evaluation.suites import Job, TaskIndex
from tests.evaluation.conftest import ITEMS, write_dataset
from tests.tiny import ARCHITECTURES, dense_model, routed_model, tokens

Evaluate = Callable[..., EvalReport]


@pytest.fixture
def evaluate(data_dir: Path, task_dir: Path, tokenizer: PreTrainedTokenizerFast) -> Evaluate:
    """`dtfcli.evaluate` on the toy tasks."""

    def run(model: Any, tasks: Any, **options: Any) -> EvalReport:
        return dtfcli.evaluate(
            model, tasks, **{"tokenizer": tokenizer, "data_dir": data_dir, "include_path": task_dir} | options
        )

    return run


def _requests(rows: int) -> list[Any]:
    """Scored requests of many lengths; some share their inputs, as one-token answers do."""
    ids = tokens(rows, 60, seed=3).tolist()
    requests = []
    for i, row in enumerate(ids):
        context, continuation = row[: 2 + (7 * i) % 50], row[50 : 51 + i % 3]
        requests.append((None, context, continuation))
        requests.append((None, context, [*continuation[:-1], (continuation[-1] + 1) % 90]))
    return requests


@pytest.mark.parametrize("routing", ["threshold", "topk"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_do_not_depend_on_the_batch(architecture: str, routing: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = routed_model("llama", architecture)
    model.set_routing(routing)
    requests = _requests(20)
    alone, together = RoutedLM(model, tokenizer, 1), RoutedLM(model, tokenizer, 8)
    one_by_one = [alone._loglikelihood_tokens([request])[0] for request in requests]
    batched = together._loglikelihood_tokens(requests)
    assert [answer[1] for answer in batched] == [answer[1] for answer in one_by_one]
    torch.testing.assert_close(
        torch.tensor([answer[0] for answer in batched]),
        torch.tensor([answer[0] for answer in one_by_one]),
        atol=1e-4,
        rtol=0,
    )
    # Each input once, however many answers share it, and never its padding.
    distinct = {tuple(context + continuation[:-1]) for _, context, continuation in requests}
    assert together.meter.read().tokens == sum(map(len, distinct))


def test_a_stock_harness_would_let_padding_compete(tokenizer: PreTrainedTokenizerFast) -> None:
    """The reason for `RoutedLM`: without the mask, top-K scores depend on the neighbors."""
    model = routed_model("llama", "dtf")
    model.set_routing("topk")
    requests = _requests(20)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)._loglikelihood_tokens(requests)
    ours = RoutedLM(model, tokenizer, 8)._loglikelihood_tokens(requests)
    assert max(abs(a[0] - b[0]) for a, b in zip(stock, ours, strict=True)) > 1e-2


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_dense_model_scores_as_in_the_stock_harness(
    batch_size: int,
    evaluate: Evaluate,
    data_dir: Path,
    task_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # it would know another `quiz`
    model, names = dense_model(), ("toy_choice", "toy_text", "toy_writing")
    ours = evaluate(model, names, num_fewshot=2, limit=10, batch_size=batch_size)
    manager = TaskManager(include_defaults=False, include_path=[task_dir])
    stock = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[{**manager.task_index[n].cfg, "dataset_path": str(data_dir / "toy" / "quiz")} for n in names],
        num_fewshot=2,
        limit=10,
        task_manager=manager,
    )
    for name, result in ours.results.items():
        assert result.n == 10
        for metric, score in result.metrics.items():
            assert score.value == stock["results"][name][f"{metric},none"]
            theirs = stock["results"][name][f"{metric}_stderr,none"]
            assert theirs == "N/A" or score.stderr == theirs
    samples = {sample["doc_id"]: sample for sample in stock["samples"]["toy_choice"]}
    assert ours.items["toy_choice"].values["acc"] == [samples[i]["acc"] for i in range(10)]


def test_the_report_says_what_scores_depend_on(evaluate: Evaluate) -> None:
    report = evaluate(
        routed_model("llama", "mod"), ["toy_choice", "toy_writing"], limit=5, capacity=0.25, num_fewshot=3
    )
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    conditions = {"architecture": "mod", "routing": "threshold", "causal": True, "capacity": 0.25, "seed": 1234}
    assert {name: document[name] for name in conditions} == conditions
    assert document["model_hash"].startswith("sha256:")
    assert {"python", "dtfcli", "torch", "transformers", "lm_eval"} <= set(document["versions"])
    assert document["seconds"] > 0
    shares = []
    for result in document["results"].values():
        of_task = {"n": 5, "n_total": ITEMS, "shots": 3, "fewshot_from": "train", "data_source": "data-dir"}
        assert {name: result[name] for name in of_task} == of_task
        assert set(result["routed_share"]["by_layer"]) == {"1", "3", "5"}
        assert 0 < result["routed_share"]["overall"] < 0.6
        assert result["truncated"] == 0
        shares.append(result["routed_share"]["tokens"])
    assert document["routed_share"]["tokens"] == sum(shares)


def test_a_group_is_one_job_and_the_document_reads_back(evaluate: Evaluate, tmp_path: Path) -> None:
    report = evaluate(routed_model("llama", "mod"), "toy_group,toy_text", limit=4, num_fewshot=1)
    group = report.results["toy_group"]
    assert group.subtasks == ("toy_choice", "toy_other")
    assert group.n == 8
    assert group.metrics["acc"].value == sum(report.results[name].metrics["acc"].value for name in group.subtasks) / 2
    assert group.metrics["acc"].higher_is_better
    assert group.routed_share is not None
    assert report.results["toy_choice"].routed_share is None
    write_document(report.to_dict(), tmp_path / "report.json")
    again = EvalReport.read(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert isinstance(again.results["toy_group"].metrics["acc"], Metric)


def test_topk_is_marked_and_cannot_write(evaluate: Evaluate) -> None:
    model = routed_model()
    report = evaluate(model, "toy_choice,toy_text", limit=4, routing="topk")
    assert report.routing == "topk"
    assert not report.causal
    assert not any(result.causal for result in report.results.values())
    with pytest.raises(ConfigError, match=r"toy_writing.*--routing threshold"):
        evaluate(model, "toy_choice,toy_writing", limit=4, routing="topk")


def test_a_dense_model_has_no_routing(evaluate: Evaluate) -> None:
    """Its examples come from the scored split, because the data has no other."""
    report = evaluate(dense_model(), "toy_half", num_fewshot=2, limit=4)
    assert (report.architecture, report.causal, report.capacity, report.routed_share) == ("dense", True, None, None)
    result = report.results["toy_half"]
    assert result.missing_splits == ("train",)
    assert result.split == "validation"
    assert result.fewshot_from == "validation (item excluded)"
    with pytest.raises(ConfigError, match="dense"):
        evaluate(dense_model(), "toy_choice", routing="threshold")


def test_a_changed_folder_is_read_again(task_dir: Path, tmp_path: Path) -> None:
    """Also one of the same name elsewhere: the cache of `datasets` knows only the name."""
    counts = []
    for place, items in (("one", 6), ("other", 9), ("other", 7)):
        write_dataset(tmp_path / place / "toy" / "quiz", {"train": 4, "validation": items})
        loaded = load_job(Job("toy_text", None), TaskIndex(["toy_text"], task_dir), tmp_path / place)
        counts.append(len(loaded.tasks["toy_text"].eval_docs))
    assert counts == [6, 9, 7]


def test_an_item_is_never_its_own_example(data_dir: Path, task_dir: Path) -> None:
    task = load_job(Job("toy_half", ITEMS - 1), TaskIndex(["toy_half"], task_dir), data_dir).tasks["toy_half"]
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, ITEMS - 1)
        assert context.count(doc["question"]) == 1
        assert context.endswith(doc["question"])


def test_long_prompts_are_counted(evaluate: Evaluate) -> None:
    report = evaluate(dense_model(max_position_embeddings=64), "toy_choice", num_fewshot=8, limit=3)
    assert report.results["toy_choice"].truncated == 12


def test_all_examples_that_there_are_can_be_used(evaluate: Evaluate) -> None:
    assert evaluate(dense_model(), "toy_writing", num_fewshot=30, limit=1).results["toy_writing"].shots == 30
    assert evaluate(dense_model(), "toy_half", num_fewshot=ITEMS - 1, limit=1).results["toy_half"].n == 1
    for task, shots in (("toy_writing", 31), ("toy_choice", 30), ("toy_half", ITEMS)):
        with pytest.raises(DataError, match=f"{task}: {shots} shots"):
            evaluate(dense_model(), task, num_fewshot=shots, limit=1)


def test_bfloat16_and_auto_batches(evaluate: Evaluate) -> None:
    report = evaluate(routed_model().to(torch.bfloat16), "toy_choice,toy_text,toy_writing", limit=4)
    assert (report.dtype, report.batch_size) == ("bfloat16", "auto")
