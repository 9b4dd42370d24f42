"""Runs one job through lm-eval: loads its tasks, has the requests answered, and collects the scores."""

import contextlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate as lm_evaluate

from dtfcli.errors import DataError
from dtfcli.evaluation import sandbox
from dtfcli.evaluation.answers import AnswerStore
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.local_data import Origin, evaluated_split, fewshot_split, task_data
from dtfcli.evaluation.report import Items, Metric, TaskScore, is_causal, shares_of
from dtfcli.evaluation.suites import Job, TaskIndex
from dtfcli.evaluation.task_files import explained_task_errors, sandboxed_templates
from dtfcli.statistics import jackknife_stderr

SEED = 1234
"""lm-eval's own default for few-shot sampling, NumPy and torch."""


@dataclass
class LoadedJob:
    """A job with its tasks and datasets in memory: the result of `TaskManager.load`, and where its data came from."""

    job: Job
    loaded: Any
    origins: dict[str, Origin]

    @property
    def tasks(self) -> dict[str, Any]:
        """Leaf tasks by name."""
        return self.loaded["tasks"]

    def configuration(self) -> dict[str, Any]:
        """Everything that the answers depend on, except the model."""
        return {name: {**task.dump_config(), "splits": str(task.dataset)} for name, task in self.tasks.items()}

    @sandboxed_templates()
    def requests(self) -> int:
        """The number of requests; an estimate until `score` has built them."""
        total = 0
        for task in self.tasks.values():
            docs = len(task.eval_docs)
            docs = docs if self.job.limit is None else min(docs, self.job.limit)
            total += docs * (len(task.doc_to_choice(task.task_docs[0])) if task.config.doc_to_choice else 1)
        return total


def load_job(job: Job, index: TaskIndex, data_dir: Path | None) -> LoadedJob:
    """Load the tasks of a job with their data, and set their shots as lm-eval's own command line would.

    Raises:
        DataError: a dataset is not available, or has too few examples for the shots.
        ConfigError: a task file is wrong.
    """
    explained = explained_task_errors(job.name, index.manager.task_index.get(job.name), data_dir)
    with task_data(data_dir) as origins, sandboxed_templates(), explained:
        loaded = index.manager.load([job.name])
    for name, task in loaded["tasks"].items():
        of_task = task.get_config("num_fewshot")
        # A task file with 0 shots keeps them: its prompt holds examples already, or must not have any.
        shots = of_task if of_task == 0 or (of_task is not None and job.shots is None) else job.shots or 0
        shots = 0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else shots  # these have no prompt
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=SEED)
        examples = len(getattr(getattr(task, "sampler", None), "df", ()) or ())
        # If both splits have the same name, lm-eval draws one more example, to leave out the item itself.
        spare = int(task.config.fewshot_config.split == task.config.test_split)
        if shots > 0 and examples < shots + spare:
            raise DataError(f"{name}: {shots} shots, but there are only {examples} examples; lower --num-fewshot.")
    return LoadedJob(job, loaded, origins)


def score(
    loaded: LoadedJob, lm: RoutedLM, store: AnswerStore, unsafe_code: bool
) -> tuple[dict[str, TaskScore], dict[str, Items]]:
    """Run a job; returns scores and items by task and group."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    lm.begin(store)
    with sandboxed_templates():
        outcome: Any = lm_evaluate(
            lm=lm,
            task_dict=loaded.loaded,
            limit=loaded.job.limit,
            log_samples=True,
            confirm_run_unsafe_code=unsafe_code,
        )
    tasks, job = loaded.tasks, loaded.job.name
    items = {name: _items(outcome["samples"][name], task) for name, task in tasks.items()}
    results = {
        name: _task_score(name, task, loaded.origins.get(name), outcome, items[name], lm.routing)
        for name, task in tasks.items()
    }
    for name, group in loaded.loaded.get("groups", {}).items():
        members = [task.task_name for task in group.get_all_tasks()]
        results[name] = _group_score(name, group, [results[member] for member in members], outcome)
        items[name] = _group_items(group, [items[member] for member in members])
    # The job's own score says how its answers came about; a tag has none, so its first member does.
    places = {job if job in results else next(iter(tasks)), *(tasks if len(tasks) == 1 else ())}
    for place in places:
        results[place] = replace(
            results[place],
            routed_share=shares_of(lm.meter),
            truncated=lm.truncated,
            seconds=round(lm.seconds, 3),
            notes=_notes(tasks, lm),
        )
    return results, {name: item for name, item in items.items() if item is not None}


def _notes(tasks: dict[str, Any], lm: RoutedLM) -> tuple[str, ...]:
    notes = tuple(f"max_gen_toks {length} shortened to {used}" for length, used in lm.shortened.items())
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
        notes += (f"the model's code ran in a sandbox, kept off the network by: {sandbox.isolation()}",)
    return notes


def _task_score(
    name: str, task: Any, origin: Origin | None, outcome: dict[str, Any], items: Items | None, routing: str
) -> TaskScore:
    shots = task.get_config("num_fewshot")
    return TaskScore(
        metrics=_metrics(outcome["results"][name], outcome["higher_is_better"].get(name, {}), items),
        n=outcome["n-samples"][name]["effective"],
        n_total=outcome["n-samples"][name]["original"],
        shots=shots,
        fewshot_from=_fewshot_from(task) if shots else None,
        split=evaluated_split(task) if hasattr(task.config, "test_split") else None,
        dataset=origin.name if origin else None,
        data_source=origin.source if origin else None,
        missing_splits=origin.missing_splits if origin else (),
        routing=routing,
        causal=is_causal(routing),
        version=outcome["versions"].get(name),
    )


def _fewshot_from(task: Any) -> str:
    split = fewshot_split(task)
    if split is None:
        return "the task"
    return f"{split} (item excluded)" if split == evaluated_split(task) else split


def _metrics(outcome: dict[str, Any], directions: dict[str, Any], items: Items | None) -> dict[str, Metric]:
    """lm-eval's figures. Where it has no standard error (perplexities), the jackknife gives one over the items."""
    scores = {}
    for key, value in outcome.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr: Any = outcome.get(f"{metric}_stderr,{filtered}")
        name = key.removesuffix(",none")
        if not isinstance(stderr, (int, float)):
            stderr = None
            if items is not None and name in items.values:
                values, aggregate = items.values[name], items.aggregate[name]
                with contextlib.suppress(ArithmeticError, ValueError, TypeError):
                    stderr = jackknife_stderr(lambda kept, v=values, f=aggregate: f([v[i] for i in kept]), len(values))
        scores[name] = Metric(float(value), None if stderr is None else float(stderr), directions.get(metric))
    return scores


def _items(samples: list[dict[str, Any]], task: Any) -> Items | None:
    """Each item's metrics, from lm-eval's log of samples."""
    values: dict[str, list[Any]] = {}
    hashes: dict[str, list[str]] = {}
    for sample in samples:
        hashes.setdefault(sample["filter"], []).append(f"{sample['doc_id']} {sample['doc_hash']}")
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}".removesuffix(",none"), []).append(sample[metric])
    if not hashes:
        return None
    order = next(iter(hashes.values()))
    aggregation = task.aggregation()
    aggregate = {name: aggregation.get(name.partition(",")[0], mean) for name in values}
    return Items(tuple(order), values, aggregate)


def _group_score(name: str, group: Any, members: list[TaskScore], outcome: dict[str, Any]) -> TaskScore:
    def common(attribute: str) -> Any:
        values = {getattr(score, attribute) for score in members}
        return values.pop() if len(values) == 1 else None

    datasets = {score.dataset.partition(" (")[0] for score in members if score.dataset}
    directions = {metric: known.higher_is_better for score in members for metric, known in score.metrics.items()}
    return TaskScore(
        metrics=_metrics(outcome["results"].get(name, {}), directions, None),
        n=sum(score.n for score in members),
        n_total=sum(score.n_total for score in members if score.n_total is not None),
        shots=common("shots"),
        fewshot_from=common("fewshot_from"),
        split=common("split"),
        dataset=datasets.pop() if len(datasets) == 1 else None,
        data_source=common("data_source"),
        missing_splits=tuple(sorted({split for score in members for split in score.missing_splits})),
        routing=members[0].routing,
        causal=members[0].causal,
        version=outcome["versions"].get(name),
        subtasks=tuple(group.child_names),
    )


def _group_items(group: Any, members: list[Items | None]) -> Items | None:
    """All items of a group whose score is the mean over them."""
    present = [items for items in members if items is not None]
    weighted = [
        config.metric for config in getattr(group, "aggregate_metric_list", None) or [] if config.weight_by_size
    ]
    if not present or len(present) < len(members):
        return None
    values = {
        metric: [value for items in present for value in items.values[metric]]
        for metric in weighted
        if all(metric in items.values for items in present)
    }
    hashes = tuple(digest for items in present for digest in items.hashes)
    return Items(hashes, values, dict.fromkeys(values, mean))
