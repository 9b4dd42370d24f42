"""Suites, and the task files of our own: the same questions as lm-eval's, judged here."""

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerFast

import dtfcli
from dtfcli.errors import ConfigError
from dtfcli.evaluation.harness import load_job
from dtfcli.evaluation.plan import EvalOptions, NotConfirmed, make_plan
from dtfcli.evaluation.suites import OWN_TASKS, Job, TaskIndex
from tests.tiny import dense_model

ASKED = [
    "dataset_path",
    "dataset_name",
    "doc_to_text",
    "doc_to_target",
    "target_delimiter",
    "num_fewshot",
    "test_split",
]


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_our_code_tasks_ask_what_lm_eval_asks(name: str) -> None:
    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml", resolve_func=False)
    ours = load_yaml(OWN_TASKS / f"{name}.yaml", resolve_func=False)
    assert {key: ours.get(key) for key in ASKED} == {key: theirs.get(key) for key in ASKED}
    assert ours["generation_kwargs"] == theirs["generation_kwargs"]
    assert ours["unsafe_code"] is True


def test_shots_and_limits_of_suites() -> None:
    plan = make_plan("general,perplexity,math")
    shots = {job.name: job.shots for job in plan.jobs}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "winogrande": 5,
        "truthfulqa_mc2": 0,
        "wikitext": 0,
        "validation_text": None,
        "gsm8k": 5,
        "mathqa": 0,
    }
    assert len(list(plan.index.leaves("mmlu"))) == 57
    assert len(plan.index.manager.task_index) < 1000, "suites must not need all of lm-eval's task files"
    assert {job.limit for job in make_plan("quick_test").jobs} == {200}
    jobs = make_plan(["quick_test", "arc_easy"], EvalOptions(limit=7, num_fewshot=3)).jobs
    assert {(job.shots, job.limit) for job in jobs} == {(3, 7)}
    assert [job.name for job in jobs] == ["arc_challenge", "hellaswag", "arc_easy"]
    assert len(make_plan("quick_test,quick_test").jobs) == 2
    with pytest.raises(ConfigError, match=r"mmlu_anatomy is in both general and mmlu_anatomy"):
        make_plan("general,mmlu_anatomy")


@pytest.mark.slow
def test_lm_evals_other_tasks_are_known() -> None:
    assert [job.name for job in make_plan("sciq").jobs] == ["sciq"]


def test_code_is_run_only_when_allowed() -> None:
    with pytest.raises(NotConfirmed, match="humaneval, mbpp"):
        make_plan("code")
    assert len(make_plan("code", EvalOptions(confirm_run_unsafe_code=True)).jobs) == 2


def test_mbpp_shows_the_authors_three_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "google-research-datasets" / "mbpp"
    folder.mkdir(parents=True)
    rows = [
        {"task_id": i, "text": f"Task {i}.", "code": f"x = {i}", "test_list": [f"assert x == {i}"] * 3}
        for i in range(1, 9)
    ]
    for split, part in (("prompt", rows[:6]), ("test", rows[6:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    splits = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("prompt", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: full\n  data_files:\n{splits}---\n")

    task = load_job(Job("mbpp", 3), TaskIndex(["code"]), tmp_path).tasks["mbpp"]
    context = task.fewshot_context(task.eval_docs[0], 3)
    assert [f"task: Task {i}." in context for i in range(1, 9)] == [False, True, True, True, False, False, True, False]
    assert context.count("[DONE]") == 3

    report = dtfcli.evaluate(
        dense_model(), "mbpp", tokenizer=tokenizer, data_dir=tmp_path, limit=1, confirm_run_unsafe_code=True
    )
    assert report.results["mbpp"].metrics["pass@1"].value == 0.0
    assert report.results["mbpp"].fewshot_from == "prompt"
    assert "sandbox" in report.results["mbpp"].notes[-1]
