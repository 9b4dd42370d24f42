"""One job through lm-eval: its tasks loaded, its requests answered, its scores with all they depend on."""

import contextlib
import io
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate as lm_evaluate

from dtfcli.errors import ConfigError, DataError
from dtfcli.evaluation import sandbox
from dtfcli.evaluation.answers import AnswerStore
from dtfcli.evaluation.compare import jackknife_stderr
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.local_data import Origin, evaluated_split, fewshot_split, task_data
from dtfcli.evaluation.report import Items, Score, TaskScore, shares_of
from dtfcli.evaluation.suites import Job, TaskIndex
from dtfcli.quiet import quiet_libraries

SEED = 1234
"""lm-eval's own default for few-shot sampling, NumPy and torch."""

_BARS = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)


@dataclass(frozen=True)
class Routing:
    """How a model routes, for the record."""

    mode: str
    causal: bool


@dataclass
class LoadedJob:
    """A job with its tasks and datasets in memory.

    Attributes:
        loaded: what `TaskManager.load` returns.
        origins: where each task's data came from.
    """

    job: Job
    loaded: Any
    origins: dict[str, Origin]

    @property
    def tasks(self) -> dict[str, Any]:
        """Leaf tasks by name."""
        return self.loaded["tasks"]

    def configuration(self) -> dict[str, Any]:
        """What the tasks' answers depend on, apart from the model."""
        return {name: {**task.dump_config(), "splits": str(task.dataset)} for name, task in self.tasks.items()}

    def requests(self) -> int:
        """How many there are, once `score` has built them; an estimate before."""
        total = 0
        for task in self.tasks.values():
            docs = len(task.eval_docs)
            docs = docs if self.job.limit is None else min(docs, self.job.limit)
            total += docs * (len(task.doc_to_choice(task.task_docs[0])) if task.config.doc_to_choice else 1)
        return total


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep lm-eval and datasets from printing, logging and drawing bars; none of it may go to stdout in any case."""
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "fsspec")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    drawers = [module.tqdm for module in _BARS]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, drawer in zip(_BARS, drawers, strict=True):
        module.tqdm = partial(drawer, disable=True)
    try:
        with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for module, drawer in zip(_BARS, drawers, strict=True):
            module.tqdm = drawer
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_job(job: Job, index: TaskIndex, data_dir: Path | None) -> LoadedJob:
    """Load the tasks of a job with their data, and set their shots as lm-eval's own command line would.

    Raises:
        DataError: a dataset cannot be had, or has too few examples for the shots.
        ConfigError: a task's file is wrong.
    """
    with task_data(data_dir) as origins:
        try:
            loaded = index.manager.load([job.name])
        except (DataError, ConfigError):
            raise
        except Exception as error:  # from the user's task files, whose mistakes raise anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"--tasks {job.name}: the task cannot be loaded. {type(error).__name__}: {reason}"
            ) from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        # A task that says 0 means it: its prompt has its examples in it, or must not have any.
        shots = own if own == 0 or (own is not None and job.shots is None) else job.shots or 0
        shots = 0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else shots  # which have no prompt
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=SEED)
        examples = len(getattr(getattr(task, "sampler", None), "df", ()) or ())
        # Where these two are spelled alike lm-eval draws one more, to leave the item itself out.
        spare = int(task.config.fewshot_config.split == task.config.test_split)
        if shots > 0 and examples < shots + spare:
            raise DataError(f"{name}: {shots} shots, but there are only {examples} examples; lower --num-fewshot.")
    return LoadedJob(job, loaded, origins)


def score(loaded: LoadedJob, lm: RoutedLM, store: AnswerStore, routing: Routing, unsafe_code: bool) -> Any:
    """Run a job.

    Returns:
        (results by task and group as `TaskScore`, items by task and group as `Items`)
    """
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    lm.begin(store)
    found: Any = lm_evaluate(
        lm=lm,
        task_dict=loaded.loaded,
        limit=loaded.job.limit,
        log_samples=True,
        confirm_run_unsafe_code=unsafe_code,
    )
    items = {name: _items(found["samples"][name], task) for name, task in loaded.tasks.items()}
    notes = tuple(f"max_gen_toks {asked} shortened to {given}" for asked, given in lm.shortened.items())
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded.tasks.values()):
        notes += (f"the model's code ran in a sandbox, kept off the network by: {sandbox.isolation()}",)
    measured: dict[str, Any] = {
        "routed_share": shares_of(lm.meter),
        "truncated": lm.truncated,
        "seconds": round(lm.seconds, 3),
        "notes": notes,
    }
    unmeasured: dict[str, Any] = {"routed_share": None, "truncated": None, "seconds": None}
    alone = len(loaded.tasks) == 1
    results = {}
    for name, task in loaded.tasks.items():
        origin = loaded.origins.get(name)
        shots = task.get_config("num_fewshot")
        results[name] = TaskScore(
            metrics=_metrics(found["results"][name], found["higher_is_better"].get(name, {}), items[name]),
            n=found["n-samples"][name]["effective"],
            n_total=found["n-samples"][name]["original"],
            shots=shots,
            fewshot_from=_fewshot_from(task) if shots else None,
            split=evaluated_split(task) if hasattr(task.config, "test_split") else None,
            dataset=_dataset_name(origin),
            data_source=origin.source if origin else None,
            missing_splits=origin.missing_splits if origin else (),
            routing=routing.mode,
            causal=routing.causal,
            version=found["versions"].get(name),
            **(measured if alone else unmeasured),
        )
    for name, group in loaded.loaded.get("groups", {}).items():
        members = [task.task_name for task in group.get_all_tasks()]
        results[name] = _group(
            name, group, members, results, found, measured if name == loaded.job.name else unmeasured
        )
        items[name] = _group_items(group, [items[member] for member in members])
    if not alone and loaded.job.name not in results:  # a tag: its members have no common score
        first = next(iter(loaded.tasks))
        results[first] = TaskScore(**{**results[first].__dict__, **measured})
    return results, {name: item for name, item in items.items() if item is not None}


def _dataset_name(origin: Origin | None) -> str | None:
    if origin is None:
        return None
    return origin.dataset if origin.config is None else f"{origin.dataset} ({origin.config})"


def _fewshot_from(task: Any) -> str:
    split = fewshot_split(task)
    if split is None:
        return "the task"
    return f"{split} (item excluded)" if split == evaluated_split(task) else split


def _metric_name(key: str) -> str:
    """`acc,none` → `acc`; other filters stay."""
    return key.removesuffix(",none")


def _metrics(found: dict[str, Any], directions: dict[str, Any], items: Items | None) -> dict[str, Score]:
    """lm-eval's figures; where it has no standard error (perplexities), the jackknife's over the items."""
    scores = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr: Any = found.get(f"{metric}_stderr,{filtered}")
        name = _metric_name(key)
        if not isinstance(stderr, (int, float)):
            stderr = None
            if items is not None and name in items.values:
                values, aggregate = items.values[name], items.aggregate[name]
                with contextlib.suppress(ArithmeticError, ValueError, TypeError):
                    stderr = jackknife_stderr(lambda kept, v=values, f=aggregate: f([v[i] for i in kept]), len(values))
        scores[name] = Score(float(value), None if stderr is None else float(stderr), directions.get(metric))
    return scores


def _items(samples: list[dict[str, Any]], task: Any) -> Items | None:
    """Each item's metrics, from lm-eval's log of samples."""
    values: dict[str, list[Any]] = {}
    hashes: dict[str, list[str]] = {}
    for sample in samples:
        hashes.setdefault(sample["filter"], []).append(f"{sample['doc_id']} {sample['doc_hash']}")
        for metric in sample["metrics"]:
            values.setdefault(_metric_name(f"{metric},{sample['filter']}"), []).append(sample[metric])
    if not hashes:
        return None
    order = next(iter(hashes.values()))
    aggregation = task.aggregation()
    aggregate = {name: aggregation.get(name.partition(",")[0], mean) for name in values}
    return Items(tuple(order), values, aggregate)


def _group(
    name: str, group: Any, members: list[str], results: dict[str, TaskScore], found: Any, measured: dict[str, Any]
) -> TaskScore:
    mine = [results[member] for member in members]

    def common(attribute: str) -> Any:
        values = {getattr(score, attribute) for score in mine}
        return values.pop() if len(values) == 1 else None

    datasets_used = {score.dataset.partition(" (")[0] for score in mine if score.dataset}
    missing = tuple(sorted({split for score in mine for split in score.missing_splits}))
    totals = [score.n_total for score in mine if score.n_total is not None]
    directions = {metric: known.higher_is_better for score in mine for metric, known in score.metrics.items()}
    return TaskScore(
        metrics=_metrics(found["results"].get(name, {}), directions, None),
        n=sum(score.n for score in mine),
        n_total=sum(totals),
        shots=common("shots"),
        fewshot_from=common("fewshot_from"),
        split=common("split"),
        dataset=datasets_used.pop() if len(datasets_used) == 1 else None,
        data_source=common("data_source"),
        missing_splits=missing,
        routing=mine[0].routing,
        causal=mine[0].causal,
        version=found["versions"].get(name),
        subtasks=tuple(group.child_names),
        **measured,
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
